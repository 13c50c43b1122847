// Restart delays for a server that ended, and the limit after which it is not restarted.

/** Delay before each restart attempt. */
export const PAUSES_MS: readonly number[] = [0, 1_000, 4_000, 15_000];
/** A server that ran this long started correctly, so its end does not count as a failed attempt. */
export const STABLE_MS = 60_000;

export class Backoff {
  private tries = 0;
  private startedAt: number | undefined;

  constructor(private readonly now: () => number = Date.now) {}

  /** Record that the server runs. */
  onStarted(): void {
    this.startedAt = this.now();
  }

  /** Return the milliseconds to wait before the next start, or `undefined` if the server ended too often. */
  onEnded(): number | undefined {
    if (this.startedAt !== undefined && this.now() - this.startedAt >= STABLE_MS) {
      this.tries = 0;
    }
    this.startedAt = undefined;
    return PAUSES_MS[this.tries++];
  }

  /** Forget earlier attempts, because the user requested a start. */
  reset(): void {
    this.tries = 0;
    this.startedAt = undefined;
  }
}
