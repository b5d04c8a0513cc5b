"""Artefacts: named, found by what they were made from, whole or not there, and told when damaged."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from faithkd import paths
from faithkd.errors import FaithkdError
from faithkd.reproduce import artefacts

PATH = "weights/mnist/seed0/FD.safetensors"
MEASURED = "measurements/mnist/alpha=0.75/seed0/FD/EmpLB/eps=0.1/images=0-9.safetensors"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FAITHKD_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("FAITHKD_FRESH", raising=False)
    monkeypatch.setattr(paths, "ROOT", tmp_path / "repository")
    return tmp_path


def content() -> dict:
    return {"0.weight": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), "0.bias": torch.zeros(3)}


def make(calls: list | None = None):
    def build(checkpoint):
        if calls is not None:
            calls.append(checkpoint)
        return content(), {"history": [1, 2]}

    return build


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_made_once_and_found_by_its_inputs(folder):
    calls: list = []
    for inputs, expected in (({"a": 1}, 1), ({"a": 1}, 1), ({"a": 2}, 2), ({"a": 2}, 2), ({"a": (2,)}, 3)):
        found, notes = artefacts.artefact(PATH, inputs, make(calls))
        assert len(calls) == expected and equal(found, content()) and notes == {"history": [1, 2]}
    files = [file for file in (folder / "store").rglob("*") if file.is_file() and ".locks" not in file.parts]
    assert files == [folder / "store" / PATH], "one file, in its place"
    assert artefacts.read(files[0])[1]["inputs"] == {"a": [2]}


def test_committed_ones_are_found_after_the_store_and_not_when_all_is_made_anew(folder, monkeypatch):
    with artefacts.watched() as asked:
        for path in (PATH, MEASURED):
            artefacts.artefact(path, {"a": 1}, make())
    assert asked == {PATH: {"a": 1}, MEASURED: {"a": 1}}
    artefacts.keep(asked)
    shutil.rmtree(folder / "store")
    packed = "measurements/mnist/alpha=0.75/seed0.safetensors"
    assert sorted(str(file.relative_to(folder / "repository")) for file in folder.rglob("*.s*")) == [packed, PATH]
    for fresh, expected in (("", []), ("measurements", [MEASURED]), ("1", [PATH])):
        monkeypatch.setenv("FAITHKD_FRESH", fresh)
        made = []
        for path in (PATH, MEASURED):
            calls: list = []
            found, notes = artefacts.artefact(path, {"a": 1}, make(calls))
            assert equal(found, content()) and notes == {"history": [1, 2]}
            made += [path] if calls else []
        assert made == expected
    monkeypatch.setenv("FAITHKD_FRESH", "")
    shutil.rmtree(folder / "store")
    calls = []
    artefacts.artefact(MEASURED, {"a": 2}, make(calls))
    assert len(calls) == 1, "made from other inputs"


def test_what_is_packed_stays_when_more_is_kept(folder):
    other = MEASURED.replace("0.1", "0.2")
    for path in (MEASURED, other):
        artefacts.artefact(path, {}, make())
        artefacts.keep({path: {}})
    assert all(artefacts.packed(path, {}) for path in (MEASURED, other))
    (file,) = (folder / "repository").rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.warns(UserWarning, match="git checkout"):
        assert artefacts.packed(other, {}) is None
    assert file.read_bytes() == bytes(data)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:100],
        lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
        lambda data: b"\xff" * 500,
    ],
    ids=["empty", "short", "a bit", "noise"],
)
def test_damage_is_told_put_aside_and_made_again(spoil, folder):
    artefacts.artefact(PATH, {}, make())
    file = folder / "store" / PATH
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.warns(UserWarning, match="is damaged .* made again"):
        found, _ = artefacts.artefact(PATH, {}, make())
    assert equal(found, content()) and file.with_name(f"{file.name}.damaged").exists()


def test_damaged_committed_ones_are_told_and_left(folder):
    file = folder / "repository" / PATH
    file.parent.mkdir(parents=True)
    file.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="git checkout"):
        artefacts.artefact(PATH, {}, make())
    assert file.read_bytes() == b"damaged"


def test_a_killed_making_goes_on_at_its_checkpoint_and_only_for_the_same_inputs(folder):

    def killed(checkpoint):
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artefacts.artefact(PATH, {"a": 1}, killed)
    seen = []
    for inputs in ({"a": 2}, {"a": 1}):
        artefacts.artefact(PATH, inputs, lambda checkpoint: (seen.append(checkpoint.exists()), make()(None))[1])
        if inputs == {"a": 2}:
            with pytest.raises(KeyboardInterrupt):
                artefacts.artefact(PATH, {"a": 1}, killed)
    assert seen == [False, True] and not list((folder / "store").rglob("*.checkpoint"))


WRITER = """
import sys
from pathlib import Path
from faithkd import paths
for number in range(10**6):
    paths.write(Path(sys.argv[1]), bytes([number % 256]) * 2_000_000)
"""


def test_sigkill_in_the_middle_of_writing_leaves_a_whole_file(folder):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder / "file")])
    try:
        while not (folder / "file").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    data = (folder / "file").read_bytes()
    assert len(data) == 2_000_000 and len(set(data)) == 1


SLOW = """
import sys, time
from faithkd.reproduce import artefacts
def make(checkpoint):
    print("made", flush=True)
    time.sleep(3)
    return {}, {}
artefacts.artefact("weights/a.safetensors", {}, make)
"""


def test_two_at_once_make_it_once():
    started = [
        subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120) for process in started]
    assert sorted(out for out, _ in said) == ["", "made\n"]
    assert any("making weights/a.safetensors; waiting" in err for _, err in said)


def test_a_store_that_cannot_be_written_is_told(monkeypatch, folder):
    (folder / "file").write_text("")
    monkeypatch.setenv("FAITHKD_STORE", str(folder / "file" / "store"))
    with pytest.raises(FaithkdError, match="set FAITHKD_STORE to another folder"):
        artefacts.artefact(PATH, {}, make())


def test_a_full_disk_is_told_and_leaves_nothing_half(monkeypatch, folder):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FaithkdError, match="No space left on device; make room"):
        artefacts.artefact(PATH, {}, make())
    assert not [file for file in (folder / "store" / "weights").rglob("*") if file.is_file()]


def test_a_store_of_an_older_version_is_left_alone_and_said_to_be_old_once(folder, capsys):
    old = folder / "store" / "network" / "mnist-RT-seed0-0123456789abcdef.json"
    old.parent.mkdir(parents=True)
    old.write_text("{}")
    for count in (1, 0):
        artefacts.warn_of_old_store()
        assert capsys.readouterr().err.count("older version of faithkd") == count
    artefacts.artefact(PATH, {}, make())
    assert old.read_text() == "{}"
