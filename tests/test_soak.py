"""A short soak: three editors, the real model, things killed. The long one: ``fimserver bench soak --edits 20000``."""

import json

from command import run


def test_a_short_soak() -> None:
    result = run("bench", "soak", *["--editors", "3", "--edits", "200", "--faults", "5", "--seed", "3", "--json"])
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads(result.stdout)
    assert summary["edits"] >= 600
    assert summary["requests"] > 0
    assert sum(summary["faults"].values()) == 5
    for name in ("errors", "unanswered", "misplaced", "different_texts", "orphans"):
        assert summary[name] == 0, name
    assert summary["message_ms_p95"] < 100
    assert summary["relay_megabytes"] < 40
