"""Every bound on what is read, kept and waited for, with its reason.

Knows:  numbers.  Never: anything else.
"""

# Time for one step of a request in the analysis process (``analysis/``), in seconds of its CPU time. A step takes 1 to
# 10 ms; a user does not wait longer than a quarter of a second for text that was not asked for.
STEP_S = 0.25
STEP_INVOKED_S = 1.0
WALL_FACTOR = 8  # times that, by the clock: a machine under load, or a file system that does not answer

# Memory of the analysis process, in bytes: a parser that fills more than this has failed.
ANALYSIS_BYTES = 2 * 2**30

# Characters of one document. Larger ones are data: VS Code stops colouring at 20 MB, and so many are never in a prompt.
DOCUMENT = 8_000_000
# Characters of all documents of one editor window, and of all windows: the text is held once here and once in the
# analysis process. Documents beyond that are not kept until others are closed.
CONNECTION = 64_000_000
ALL_CONNECTIONS = 256_000_000

# Characters of a line. VS Code does not colour longer ones (editor.maxTokenizationLineLength): they are data or
# minified code.
LINE = 20_000

# Characters before the cursor that are searched for an open string or comment: 5 to 40 ms the first time. The search
# begins at a multiple of SCAN_STRIDE, so that its beginning stays the same while the cursor moves.
SCAN = 200_000
SCAN_STRIDE = 100_000
# Characters of all texts whose search is remembered.
SCANNED = 4_000_000
# Characters of another document that are read for snippets: 4 ms when it has changed.
NEIGHBOUR = 64_000
# Characters on either side of the cursor, or before the end of another document, that are searched for matches.
SEARCH = 200_000

# Characters before the cursor whose lines an offer is compared with: about a hundred lines, which is more than a block.
NEARBY = 4_000

# Characters of a match, which ends with its line: more than three lines of ghost text on a screen are a wall of text.
MATCH = 400

# Texts that the analysis process holds: the last ones of each document, which a request and the answer to the one
# before it refer to, and so many characters in all. Older ones are sent again when they are needed.
HELD_OF_A_DOCUMENT = 3
HELD_CHARACTERS = 64_000_000
