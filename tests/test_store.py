"""The store: nothing is lost, nothing damaged is used, nothing is done twice."""

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from faithkd import store
from faithkd.errors import FaithkdError
from faithkd.paths import ROOT


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An own empty store, and no committed weights."""
    monkeypatch.setenv("FAITHKD_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("FAITHKD_FRESH", raising=False)
    monkeypatch.setattr(store, "ROOT", tmp_path)
    return tmp_path / "store"


def never():
    raise AssertionError("made again although it was there")


def frame(x=1.5):
    return pd.DataFrame({"eps": ["8/255", "0.025"], "value": [x, 0.1 + 0.2], "n": [1, 2], "ok": [True, False]})


def weights(net, checkpoint=None):
    return net.state_dict(), [{"epoch": 1, "loss": 0.1 + 0.2}, {"epoch": 2, "loss": 1e-300}]


def net():
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))


def run(code, *arguments, **options):
    """Start a Python process that works in the same store."""
    code = "import os, signal, sys, time\nimport pandas as pd\nfrom faithkd import store\n" + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, text=True, **options)


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path.name} did not appear"
        time.sleep(0.01)


def test_root_follows_the_environment(monkeypatch, tmp_path):
    assert store.root() == tmp_path / "store"
    monkeypatch.delenv("FAITHKD_STORE")
    assert store.root() == tmp_path / ".store"


def test_key_is_stable_and_depends_on_everything():
    assert store.key("t", a=1, b=[0.1, "x"]) == store.key("t", b=(0.1, "x"), a=1) == "331bc4938f98dafe"
    values = [1, 1.0, True, "1", None, [1], {"a": 1}, 0.1, np.nextafter(0.1, 1), [1, 2], [2, 1]]
    variants = [*({"a": value} for value in values), {"b": 1}, {"kind": 1}, {"a": 1, "b": 1}]
    keys = {store.key(kind, **depends) for kind in ("t", "u") for depends in variants}
    assert len(keys) == 2 * len(variants)
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)


NOT_JSON = [float("nan"), float("inf"), torch.zeros(2), np.int64(1), {1}, {1: "a"}, b"x", [0, float("nan")], object()]


@pytest.mark.parametrize("value", NOT_JSON, ids=lambda value: type(value).__name__)
def test_key_refuses_what_json_cannot_hold(value):
    with pytest.raises(FaithkdError, match=r"depends\.a\.b.* cannot be part of a key"):
        store.key("t", a={"b": value})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.floats(), st.floats(width=32), st.integers(-(2**63), 2**63 - 1), st.booleans(), st.text()),
        max_size=5,
    )
)
def test_csv_keeps_every_bit(rows):
    made = pd.DataFrame(rows, columns=["a", "b", "c", "d", "e,\n"])
    made = made.astype({"a": "float64", "b": "float32", "c": "int64", "d": "bool", "e,\n": "str"})
    payload, sidecar = store._to_csv(made)
    back = store._from_csv(payload, json.loads(json.dumps(sidecar)))
    assert dict(back.dtypes) == dict(made.dtypes) and list(back["e,\n"]) == list(made["e,\n"])
    for name in "acd":
        if len(made):  # to the bit, also the sign of 0.0; NaN as NaN
            ours, theirs = back[name].to_numpy(), made[name].to_numpy()
            same = (ours.view("u1") == theirs.view("u1")).reshape(len(made), -1).all(axis=1)
            assert (same | ((ours != ours) & (theirs != theirs))).all()
    np.testing.assert_array_equal(back.b, made.b)


def test_table_is_made_once_and_comes_back_the_same():
    for loaded in (store.table("tables", {"a": 2}, frame), store.table("tables", {"a": 2}, never)):
        pd.testing.assert_frame_equal(loaded, frame(), check_exact=True)
    odd = ["", " ", "nan", "None", 'a"b', "a,b", "a\r\nb", "\r", "é≤", "1.0", "True", "#"]
    store.table("tables", {"a": 1}, lambda: pd.DataFrame({"x": odd}))
    assert list(store.table("tables", {"a": 1}, never).x) == odd


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (pd.DataFrame({"a": [1, "x"]}), "column 'a' must hold only text"),
        (pd.DataFrame({"a": ["x", None]}), "column 'a' must hold only text"),
        (pd.DataFrame({"a": pd.Series([1, None], dtype="Int64")}), "column 'a' must hold only text"),
        (pd.DataFrame({"a": pd.Categorical(["x"])}), "column 'a' must hold only text"),
        (pd.DataFrame({"a": [1]}, index=["x"]), "reset_index"),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), "different names"),
        (pd.DataFrame({1: [1]}), "different names"),
    ],
)
def test_tables_that_would_change_are_refused(bad, what):
    with pytest.raises(FaithkdError, match=what):
        store.table("tables", {"a": 1}, lambda: bad)
    assert not store.exists("tables", {"a": 1})


def test_arrays_come_back_the_same():
    shared = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    made = {"x": shared, "view": shared.T, "flag": torch.tensor(True), "y": torch.tensor([0.1, float("nan")])}
    first = store.arrays("witnesses", {"a": 1}, lambda: made)
    again = store.arrays("witnesses", {"a": 1}, never)
    for loaded in (first, again):
        assert loaded.keys() == made.keys()
        for name, tensor in made.items():
            assert loaded[name].dtype == tensor.dtype
            torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_network_with_history_and_checkpoint():
    trained, seen = net(), []

    def build(checkpoint):
        store.checkpoint.save(checkpoint, {"w": torch.ones(1)}, {"epoch": 1})
        seen.append(checkpoint)
        return weights(trained)

    for made in (build, lambda _: never()):
        loaded, history = store.network("networks", {"a": 1}, made, net, name="digits FD")
        assert not loaded.training and list(history.loss) == [0.1 + 0.2, 1e-300]
        for ours, theirs in zip(loaded.parameters(), trained.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    number = store.key("networks", a=1)
    names = sorted(path.name for path in (store.root() / "networks").iterdir())
    assert names == [f"digits-FD-{number}.json", f"digits-FD-{number}.safetensors"]  # the checkpoint is gone
    assert seen[0].parent == store.root() / "networks" and number in seen[0].name


def test_committed_weights_are_found(tmp_path, monkeypatch):
    made, _ = store.network("networks", {"a": 1}, lambda _: weights(net()), net, name="FD")
    (tmp_path / "weights").mkdir()
    os.rename(store.root() / "networks", tmp_path / "weights" / "digits")
    found, history = store.network("networks", {"a": 1}, lambda _: never(), net)
    assert torch.equal(found[0].weight, made[0].weight) and len(history) == 2
    assert store.exists("networks", {"a": 1}) and not store.exists("networks", {"a": 2})

    payload = next((tmp_path / "weights" / "digits").glob("*.safetensors"))
    payload.write_bytes(payload.read_bytes()[:-1] + b"x")
    with pytest.warns(UserWarning, match=r"is damaged .* git checkout"):
        store.network("networks", {"a": 1}, lambda _: weights(net()), net)
    assert payload.exists() and len(list((store.root() / "networks").glob("*.safetensors"))) == 1


def spoil_payload(payload, sidecar):
    data = bytearray(payload.read_bytes())
    data[len(data) // 2] ^= 1
    payload.write_bytes(data)


def edit(sidecar, **changes):
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | changes))


def swap(payload, sidecar):
    """A payload that is sound in itself, but no network of this form: other layers, or a table without its columns."""
    other = store._pack(torch.nn.Linear(7, 7).state_dict()) if payload.suffix == ".safetensors" else b"eps,value\n1\n"
    payload.write_bytes(other)
    edit(sidecar, sha256=store.hashlib.sha256(other).hexdigest())


SPOILT = {
    "a bit": spoil_payload,
    "cut": lambda payload, sidecar: payload.write_bytes(payload.read_bytes()[:-3]),
    "empty": lambda payload, sidecar: payload.write_bytes(b""),
    "gone": lambda payload, sidecar: payload.unlink(),
    "another's": swap,
    "sidecar cut": lambda payload, sidecar: sidecar.write_text(sidecar.read_text()[:30]),
    "sidecar not UTF-8": lambda payload, sidecar: sidecar.write_bytes(b"\xff\xfe" + sidecar.read_bytes()),
    "sidecar nested": lambda payload, sidecar: sidecar.write_text("[" * 10**5),
    "sidecar a list": lambda payload, sidecar: sidecar.write_text("[]"),
    "sidecar a number": lambda payload, sidecar: sidecar.write_text("5"),
    "sidecar empty": lambda payload, sidecar: sidecar.write_text("{}"),
    "checksum a number": lambda payload, sidecar: edit(sidecar, sha256=5),
    "items of another form": lambda payload, sidecar: edit(sidecar, history=5, dtypes=[1]),
    "a folder": lambda payload, sidecar: (payload.unlink(), payload.mkdir()),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("kind", ["tables", "networks"])
def test_damage_is_told_put_aside_and_made_again(spoil, kind):
    trained = net()

    def get(x):
        if kind == "tables":
            return store.table(kind, {"a": 1}, lambda: frame(x)).value[0]
        return store.network(kind, {"a": 1}, lambda _: weights(trained), net)[1].loss[0]

    good = get(1.5)
    payload = next(path for path in (store.root() / kind).iterdir() if path.suffix != ".json")
    spoil(payload, payload.with_suffix(".json"))
    with pytest.warns(UserWarning) as caught:
        assert get(1.5) == good
    assert len(caught) == 1 and str(payload) in str(caught[0].message) and "made again" in str(caught[0].message)
    assert list((store.root() / kind).glob("*.damaged"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get(2.5) == good  # not made a third time


@pytest.mark.parametrize("form", [0, 2, None, "1"])
def test_what_another_version_made_is_left_alone_and_said(form):
    store.table("tables", {"a": 1}, frame)
    (sidecar,) = (store.root() / "tables").glob("*.json")
    edit(sidecar, form=form)
    before = {path.name: path.read_bytes() for path in sidecar.parent.iterdir()}
    for use in (lambda: store.table("tables", {"a": 1}, never), lambda: store.exists("tables", {"a": 1})):
        with pytest.raises(FaithkdError, match=rf"is of form {form} of the store.*left alone; set FAITHKD_STORE"):
            use()
    assert {path.name: path.read_bytes() for path in sidecar.parent.iterdir()} == before
    content = json.loads(before[sidecar.name])
    content.pop("form")  # as the first version wrote it
    sidecar.write_text(json.dumps(content))
    assert store.table("tables", {"a": 1}, never).value[0] == 1.5


def test_a_kill_between_payload_and_sidecar_leaves_no_entry(monkeypatch):
    class Killed(BaseException):
        pass

    replace = os.replace

    def killed_before_sidecar(source, target):
        if str(target).endswith(".json"):
            raise Killed
        replace(source, target)

    monkeypatch.setattr(store.os, "replace", killed_before_sidecar)
    with pytest.raises(Killed):
        store.table("tables", {"a": 1}, frame)
    monkeypatch.setattr(store.os, "replace", replace)
    assert len(list((store.root() / "tables").glob("*.csv"))) == 1 and not store.exists("tables", {"a": 1})
    assert store.table("tables", {"a": 1}, lambda: frame(2.5)).value[0] == 2.5


def test_sigkill_in_the_middle_of_writing_damages_nothing(folder):
    code = """
        for number in range(10**6):
            table = pd.DataFrame({"x": [number * 0.1] * 3000})
            store.table("tables", {"number": number}, lambda: table)
    """
    for seconds in (0.15, 0.22):
        writer = run(code)
        try:
            wait_for(folder / "tables")
            time.sleep(seconds)
        finally:
            writer.kill()
        assert writer.wait() == -signal.SIGKILL
    (folder / "tables" / f"{store.key('tables', number=0)}.csv.0.tmp").write_text("left by a killed run")
    found = len(list((folder / "tables").glob("*.json")))
    assert found > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(found + 1):
            made = []
            build = lambda n=number, m=made: m.append(n) or pd.DataFrame({"x": [n * 0.1]})  # noqa: E731
            assert store.table("tables", {"number": number}, build).x[0] == number * 0.1
            assert bool(made) == (number == found)  # only what the kills prevented is made now


def test_a_killed_training_goes_on_at_its_checkpoint():
    code = """
        def build(checkpoint):
            store.checkpoint.save(checkpoint, {}, {"epoch": 7})
            os.kill(os.getpid(), signal.SIGKILL)
        store.network("networks", {"a": 1}, build, None)
    """
    assert run(code).wait() == -signal.SIGKILL

    def build(checkpoint):
        assert store.checkpoint.load(checkpoint) == ({}, {"epoch": 7})
        return weights(net())

    store.network("networks", {"a": 1}, build, net)  # and the killed run's lock is in nobody's way


def test_two_runs_at_once_make_it_once(tmp_path):
    code = """
        def build():
            open(sys.argv[1], "a").write("made\\n")
            end = time.monotonic() + 60
            while not os.path.exists(sys.argv[2]) and time.monotonic() < end:
                time.sleep(0.01)
            return pd.DataFrame({"x": [os.getpid()]})
        print(store.table("tables", {"a": 1}, build, name="mnist").x[0])
    """
    log, go = tmp_path / "log", tmp_path / "go"
    first = run(code, log, go, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_for(log)
        second = run(code, log, go, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert second.stderr.readline() == "another run is making tables mnist; waiting\n"
    finally:
        go.touch()
        out1, err1 = first.communicate(timeout=60)
    out2, err2 = second.communicate(timeout=60)
    assert log.read_text() == "made\n" and err1 == err2 == ""
    assert out1 == out2 == f"{first.pid}\n"


def test_a_failed_build_leaves_nothing_and_frees_the_lock():
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            store.table("tables", {"a": 1}, lambda: 1 / 0)
    assert list((store.root() / "tables").iterdir()) == []
    assert len(store.table("tables", {"a": 1}, frame)) == 2


def test_one_entry_may_need_another():
    inner = lambda: store.table("tables", {"a": 2}, frame)  # noqa: E731
    assert len(store.table("tables", {"a": 1}, inner)) == 2
    assert store.exists("tables", {"a": 2})


def test_no_pickle_is_ever_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    bomb = pickle.dumps(Bomb())
    store.network("networks", {"a": 1}, lambda _: weights(net()), net)
    sidecar = next((store.root() / "networks").glob("*.json"))
    payload = sidecar.with_suffix(".safetensors")
    payload.write_bytes(bomb)
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"sha256": store.hashlib.sha256(bomb).hexdigest()}))
    (store.root() / "networks" / f"{store.key('networks', a=1)}.checkpoint").write_bytes(bomb)

    def build(checkpoint):
        assert store.checkpoint.load(checkpoint) is None
        return weights(net())

    with pytest.warns(UserWarning, match="is damaged") as caught:
        store.network("networks", {"a": 1}, build, net)
    assert len(caught) == 2 and not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists()  # the bomb was a real one


def test_a_store_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FAITHKD_STORE", str(tmp_path / "file" / "store"))
    with pytest.raises(FaithkdError, match=r"cannot write to the store in .*file.*set FAITHKD_STORE"):
        store.table("tables", {"a": 1}, frame)
    with pytest.raises(FaithkdError, match="cannot write"):
        store.checkpoint.save(tmp_path / "file" / "x.checkpoint", {}, {})


def test_a_full_disk_is_told_and_leaves_nothing_half(monkeypatch):
    store.table("tables", {"a": 1}, frame)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(FaithkdError, match="No space left on device"):
        store.table("tables", {"a": 2}, frame)
    assert len(list((store.root() / "tables").iterdir())) == 2
    # What is there can still be read, without any lock or write.
    monkeypatch.setattr(store, "alone", None)
    assert len(store.table("tables", {"a": 1}, never)) == 2


def test_fresh_makes_everything_anew_once(monkeypatch, tmp_path):
    def value(x):
        return store.table("tables", {"a": 1}, lambda: frame(x)).value[0]

    store.network("networks", {"a": 1}, lambda _: weights(net()), net)
    (tmp_path / "weights").mkdir()
    os.rename(store.root() / "networks", tmp_path / "weights" / "digits")
    assert value(1.0) == value(2.0) == 1.0
    monkeypatch.setenv("FAITHKD_FRESH", "run 1")
    assert not store.exists("tables", {"a": 1}) and not store.exists("networks", {"a": 1})
    assert value(3.0) == value(4.0) == 3.0  # as after a restart of the same run
    with pytest.raises(AssertionError, match="made again"):
        store.network("networks", {"a": 1}, lambda _: never(), net)
    monkeypatch.setenv("FAITHKD_FRESH", "run 2")
    assert value(5.0) == 5.0
    monkeypatch.delenv("FAITHKD_FRESH")
    assert value(6.0) == 5.0
    assert len(list((store.root() / "tables").iterdir())) == 2


def test_fresh_does_not_go_on_at_an_old_checkpoint(monkeypatch):
    paths = []

    def stopped(checkpoint):
        paths.append(checkpoint)
        assert store.checkpoint.load(checkpoint) is None or len(paths) == 3
        store.checkpoint.save(checkpoint, {}, {"epoch": 1})
        raise KeyboardInterrupt

    for fresh in ("", "run 1", "run 1"):
        monkeypatch.setenv("FAITHKD_FRESH", fresh)
        with pytest.raises(KeyboardInterrupt):
            store.network("networks", {"a": 1}, stopped, net)
    assert paths[0] != paths[1] == paths[2]


def test_checkpoint_round_trip_and_damage(tmp_path):
    path = tmp_path / "new" / "x.checkpoint"
    assert store.checkpoint.load(path) is None
    tensors = {"w": torch.tensor([0.1, float("nan")]), "state": torch.get_rng_state()}
    meta = {"epoch": 3, "history": [{"loss": 0.1 + 0.2}], "note": "é"}
    store.checkpoint.save(path, {}, {})
    store.checkpoint.save(path, tensors, meta)
    loaded, loaded_meta = store.checkpoint.load(path)
    assert loaded_meta == meta and torch.equal(loaded["state"], tensors["state"]) and loaded["w"][0] == tensors["w"][0]
    good = path.read_bytes()
    position = good.index(b"epoch")
    for bad in (
        b"",
        good[:5],
        good[:-4],
        good[:-4] + b"abcd",
        good[:position] + b"epOch" + good[position + 5 :],
    ):
        path.write_bytes(bad)
        with pytest.warns(UserWarning, match=r"x\.checkpoint is damaged"):
            assert store.checkpoint.load(path) is None
        assert not path.exists() and path.with_name("x.checkpoint.damaged").read_bytes() == bad


def test_kinds_are_single_words():
    with pytest.raises(FaithkdError, match="single word"):
        store.table("../x", {}, frame)
