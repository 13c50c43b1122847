// How long to wait before a server that ended is started again, and when to give up.

/** Waits before the first try, the second, and so on. */
export const PAUSES_MS: readonly number[] = [0, 1_000, 4_000, 15_000];
/** A server that ran so long did not end because of how it was started. */
export const STABLE_MS = 60_000;

export class Backoff {
  private tries = 0;
  private startedAt: number | undefined;

  constructor(private readonly now: () => number = Date.now) {}

  /** The server runs. */
  onStarted(): void {
    this.startedAt = this.now();
  }

  /** Milliseconds to wait before the next start; `undefined` where it ended too often and nobody should go on. */
  onEnded(): number | undefined {
    if (this.startedAt !== undefined && this.now() - this.startedAt >= STABLE_MS) {
      this.tries = 0;
    }
    this.startedAt = undefined;
    return PAUSES_MS[this.tries++];
  }

  /** A person asked for a start: what was before does not count. */
  reset(): void {
    this.tries = 0;
    this.startedAt = undefined;
  }
}
