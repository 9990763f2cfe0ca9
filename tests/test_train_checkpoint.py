"""The training script's checkpoints, damaged by accident or altered with care: one line, exit code 2, nothing is changed."""

import io
import random
import re
from pathlib import Path

import pytest
import torch
from training import checkpoints, files
from training_runs import CPU, assert_bitwise_equal, checkpoint, contents, main, one_line, run, train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    assert run("--width", 2, "--momentum", "0.9", "--ema-decay", "0.5", "--out", out) == 0
    return out


def resume(out: Path) -> int:
    return main("--resume", "--device", "cpu", "--out", out)


def arguments(out: Path, *more: str):
    return train.parse_arguments(["--out", str(out), *more])


def test_every_flipped_bit_is_noticed(finished, tmp_path):
    whole, path = (finished / files.CHECKPOINT).read_bytes(), tmp_path / files.CHECKPOINT
    generator = random.Random(0)
    bits = [generator.randrange(8 * len(whole)) for _ in range(200)] + list(range(8 * len(whole) - 8 * 90, 8 * len(whole), 5))
    for bit in bits:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(train.Failure, match="is damaged"):
            checkpoints.read_checkpoint(arguments(tmp_path), CPU)
    path.write_bytes(whole)
    checkpoints.read_checkpoint(arguments(tmp_path), CPU)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "longer", "flipped", "of another program", "of torch.save"])
def test_damaged_checkpoint_is_one_line_and_stays(damage, finished, tmp_path, capsys):
    whole, path = (finished / files.CHECKPOINT).read_bytes(), tmp_path / files.CHECKPOINT
    if damage == "of another program":
        checkpoints.write_checkpoint({"model": {}}, path)
    elif damage == "of torch.save":
        torch.save(checkpoint(finished), path)
    else:
        half = len(whole) // 2
        flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
        path.write_bytes(
            {"truncated": whole[:half], "empty": b"", "text": b"no\n", "longer": whole + b"\0", "flipped": flipped}[damage]
        )
    before = contents(tmp_path)
    assert main("--resume", "--device", "cpu", "--out", tmp_path) == 2
    assert re.search("is damaged|is no checkpoint of", one_line(capsys.readouterr().err))
    assert contents(tmp_path) == before


def replaced(tree, path: str, value):
    """A copy of nested dicts and lists in which the entry at `path` is replaced; "-" before the last key removes it."""
    *way, last = path.split("/")
    copy = torch.load(_saved(tree), weights_only=True)
    node = copy
    for key in way:
        node = node[int(key) if isinstance(node, list) or (isinstance(node, dict) and 0 in node) else key]
    if last.startswith("-"):
        del node[last[1:]]
    else:
        node[int(last) if isinstance(node, list) else last] = value
    return copy


def _saved(tree) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(tree, file)
    file.seek(0)
    return file


ALTERED = [
    ("config", None),
    ("config/epochs", 1),  # less than was trained: "epoch 2/1"
    ("config/epochs", "2"),
    ("config/epochs", 2.0),
    ("config/epochs", None),
    ("config/model", "vgg"),
    ("config/model", "tutorial"),
    ("config/width", -1),
    ("config/width", 4),
    ("config/lr", float("nan")),
    ("config/lr", 1e39),
    ("config/lr", None),
    ("config/momentum", 0.5),
    ("config/top_k", 3),
    ("config/data", "auto"),
    ("config/data", "../../etc"),
    ("config/batch_size", 8),
    ("config/batch_size", 65),
    ("config/accumulate", 3),
    ("config/amp", "fp16"),
    ("config/compile", "yes"),
    ("config/resume", True),
    ("config/-seed", None),
    ("step", -1),
    ("step", 7),
    ("step", 8.0),
    ("step", 10**30),
    ("-step", None),
    ("history", []),
    ("history", None),
    ("history/1", {}),
    ("history/1/test_loss", float("nan")),
    ("history/1/test_accuracy", "high"),
    ("history/0/step", 5),
    ("losses", None),
    ("losses", torch.zeros(8, 6)),
    ("losses", torch.full((8, 2), torch.nan)),
    ("correct", torch.tensor(-1)),
    ("correct", torch.tensor(0.0)),
    ("correct", 0),
    ("model", {}),
    ("model/11.weight", torch.zeros(10, 17)),
    ("model/11.weight", torch.zeros(10, 16, dtype=torch.float64)),
    ("model/11.weight", torch.full((10, 16), torch.inf)),
    ("averaged", None),
    ("scaler", None),
    ("optimizer", {}),
    ("optimizer/param_groups", []),
    ("optimizer/param_groups/0/momentum", 0.1),
    ("optimizer/param_groups/0/params", [0]),
    ("optimizer/state", []),
    ("optimizer/state/0/momentum_buffer", torch.zeros(3)),
    ("optimizer/state/0/momentum_buffer", "none"),
]


@pytest.mark.parametrize(("path", "value"), ALTERED, ids=lambda value: value if isinstance(value, str) else None)
def test_altered_checkpoint_is_one_line_and_stays(path, value, finished, tmp_path, capsys):
    """Altered with care: the checksum is right."""
    checkpoints.write_checkpoint(replaced(checkpoint(finished), path, value), tmp_path / files.CHECKPOINT)
    before = contents(tmp_path)
    assert resume(tmp_path) == 2
    assert files.CHECKPOINT in (line := one_line(capsys.readouterr().err)) or "--" in line
    assert contents(tmp_path) == before


def test_a_checkpoint_written_again_as_it_was_is_resumed(finished, tmp_path):
    """What the test above alters is otherwise accepted."""
    checkpoints.write_checkpoint(replaced(checkpoint(finished), "step", 8), tmp_path / files.CHECKPOINT)
    assert resume(tmp_path) == 0
    assert_bitwise_equal(checkpoint(tmp_path), checkpoint(finished))
