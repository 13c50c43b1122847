"""Documents and shapes that rows of training are made of."""

from fimserver.training.corpus import Document
from fimserver.training.hole_sampling import HOLE_KINDS
from fimserver.training.rows import RowShape

SHAPE = RowShape(256, 4, 16)
TEXT = (
    "import os\n\n\ndef load_{0}(path, mode):\n    with open(path, mode) as file:\n        return file.read({0})\n\n\n"
)
DOCUMENTS = [
    Document("one", f"src/pack/deep/file_{i}.py", "".join(TEXT.format(j + i) for j in range(12))) for i in range(4)
]
EVEN = dict.fromkeys(HOLE_KINDS, 1.0)
