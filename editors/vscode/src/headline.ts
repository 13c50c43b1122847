// Splits a message into a headline, whose decisive words come first, and the details that unfold below it.

/** Longest headline in characters: what a notification shows in its first line. */
export const MOST = 60;

export interface Parts {
  readonly headline: string;
  /** Empty if the headline is all there is. */
  readonly detail: string;
}

const NAME = /^fimserver(?::| gives no completions:)\s+/;
const ENDS = [/[.?!](?=\s)/, /[;:](?=\s)/, /,(?=\s)| \(/]; // of a sentence, of a clause, of a part

/** Return a text with its first letter in upper case. */
export function capitalized(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** Return a text's headline and its details. A headline that would be too long is cut, and the details repeat it. */
export function toParts(message: string): Parts {
  const plain = message.trim().replace(NAME, "").replace(/\s+/g, " ");
  const text = capitalized(plain);
  if (text.length <= MOST) {
    return { headline: text.replace(/\.$/, ""), detail: "" };
  }
  for (const end of ENDS) {
    const found = end.exec(text);
    if (found !== null && found.index > 0 && found.index < MOST) {
      const length = found.index + (/[?!]/.test(found[0]) ? 1 : 0);
      const rest = text.slice(length).replace(/^[.;:,]?\s*/, "");
      return { headline: text.slice(0, length), detail: capitalized(rest) };
    }
  }
  const cut = text.slice(0, MOST - 3).replace(/\s+\S*$/, "");
  return { headline: `${cut}...`, detail: text };
}

/** Return the text of a notification. */
export function toText({ headline, detail }: Parts): string {
  return detail === "" ? headline : `${headline}${/[.?!]$/.test(headline) ? "" : "."} ${detail}`;
}
