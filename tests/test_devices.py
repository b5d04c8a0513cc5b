"""`device=`: bounds and attacks are computed where the images are. The device here is a CPU that says it is another one
and, like a real one, refuses operands that lie on two devices.
"""

import pytest
import torch
from pairs import fully_connected
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import faithkd
from faithkd import arguments

DEVICE = torch.device("meta")  # which needs no driver


class There(Tensor):
    """A tensor whose numbers, in `inner`, seem to be on DEVICE."""

    @staticmethod
    def __new__(cls, inner):
        options = {"dtype": inner.dtype, "device": DEVICE, "strides": inner.stride()}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, **options)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return run(function, arguments, options or {})


class Machine(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return run(function, arguments, options or {})


class Numbers(TorchFunctionMode):
    """torch.tensor(1.0, device=DEVICE), which would leave its number behind, by way of the CPU."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is Tensor.tolist and isinstance(arguments[0], There):
            return arguments[0].inner.tolist()
        if function is Tensor.new_tensor and isinstance(arguments[0], There):
            return torch.tensor(arguments[1], dtype=arguments[0].dtype, device="cpu").to(DEVICE)
        far = torch.device(options.get("device") or "cpu") == DEVICE
        if function not in (torch.tensor, torch.as_tensor) or not far or isinstance(arguments[0], Tensor):
            return function(*arguments, **options)
        return function(*arguments, **{**options, "device": "cpu"}).to(DEVICE)


def run(function, arguments, options):
    tensors = [part for part in tree_leaves((arguments, options)) if isinstance(part, Tensor)]
    there = [isinstance(part, There) for part in tensors]
    name, target = function.overloadpacket.__name__, options.get("device")
    if any(there) and name not in ("index", "index_put", "index_put_", "copy_", "_index_put_impl_"):
        lost = [part.shape for part, far in zip(tensors, there, strict=True) if not far and part.ndim]
        assert not lost, f"{name}: operands of shape {lost} are on the CPU, others on the device"
    if target is not None:
        options = {**options, "device": torch.device("cpu")}
    inner = tree_map(lambda part: part.inner if isinstance(part, There) else part, (arguments, options))
    left = [part.shape for part in tree_leaves(inner) if isinstance(part, Tensor) and part.device == DEVICE]
    assert not left, f"{name}: a tensor of shape {left} was made where this test does not see it"
    made = function(*inner[0], **inner[1])
    if function._schema.is_mutable and tensors and isinstance(made, Tensor):
        return tensors[0] if "out" not in options else options["out"]
    far = torch.device(target) == DEVICE if target is not None else any(there)
    return tree_map(lambda part: There(part) if far and isinstance(part, Tensor) else part, made)


CALLS = {
    **{method: {"method": method} for method in ("interval", "crown", "alpha-crown", "joint")},
    "bab": {"method": "bab", "nodes": 12, "agreement": True},
}


@pytest.fixture(scope="module")
def pair():
    return fully_connected(6, 8, 3), fully_connected(6, 5, 3, seed=1), torch.rand(3, 6)


@pytest.fixture(autouse=True)
def _numbers_are_there(monkeypatch):
    monkeypatch.setattr(arguments, "images", lambda x: x.detach())  # which refuses tensors without numbers


@pytest.mark.parametrize("name", CALLS)
def test_bounds_are_computed_where_the_images_are(name, pair):
    expected = faithkd.faithfulness_upper_bound(*pair, 0.1, **CALLS[name])
    with Machine(), Numbers():
        found = faithkd.faithfulness_upper_bound(*pair, 0.1, device=DEVICE, **CALLS[name])
        assert type(found.values) is Tensor  # on the CPU again
        torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-12)
        if found.lower is not None:
            torch.testing.assert_close(found.lower, expected.lower, rtol=0, atol=1e-12)
            assert isinstance(found.witnesses, There)


def test_attacks_too(pair):
    expected = faithkd.empirical_lower_bound(*pair, 0.1, steps=5)
    with Machine(), Numbers():
        found = faithkd.empirical_lower_bound(*pair, 0.1, steps=5, device=DEVICE)
    torch.testing.assert_close(found.values, expected.values)


def test_the_cpu_by_name_is_the_cpu_and_others_are_told(pair):
    plain = faithkd.faithfulness_upper_bound(*pair, 0.1).values
    assert torch.equal(plain, faithkd.faithfulness_upper_bound(*pair, 0.1, device="cpu").values)
    assert torch.equal(faithkd.certified_agreement(*pair, 0.01), faithkd.certified_agreement(*pair, 0.01, device="cpu"))
    with Machine(), Numbers(), pytest.raises(faithkd.FaithkdError, match="lp and milp are solved on the CPU"):
        faithkd.faithfulness_upper_bound(*pair, 0.1, method="lp", device=DEVICE)
    with pytest.raises(faithkd.FaithkdError, match="device 'nowhere' cannot be used"):
        faithkd.empirical_lower_bound(*pair, 0.1, device="nowhere")
