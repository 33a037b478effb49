"""The command that measures drafters: a draft that is the target is always right, and texts are compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.embedded.measure_drafters import main
from tests.tiny import write_tiny_checkpoint


def test_a_draft_that_is_the_target_is_accepted_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_tiny_checkpoint(tmp_path / "model"))
    names = "draft_model fixed,layer_subset uniform:0.5"
    options = ["--per-task", "1", "--drafts", "3", "--only", names, "--temperatures", "0,1", "--dtype", "float32"]
    main(["--model", folder, "--draft", folder, *options])
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == names.split(",") * 2
    for row in rows:
        name, _, drafted, accepted, expected, tokens, share, different = (cell.strip() for cell in row)
        assert different == "0"
        assert float(drafted) <= 3
        assert 0 < float(expected) <= 1
        assert 0 < float(share) < 1
        if name == "draft_model fixed":
            assert float(accepted) > 0.97  # the last drafts of an output may be beyond its end
            assert float(tokens) > 3
