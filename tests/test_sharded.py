"""DTensors go in, DTensors come out: attention of one process, forward and backward."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dynmask
from dynmask import LifetimeMask
from dynmask.masks.flat import dims_of, flatten, unflatten
from tests.ranks import (
    BATCH,
    DIM,
    GROUPS,
    HEADS,
    LENGTH,
    MASKS,
    RANKS,
    TOLERANCE,
    drawn,
    found_by,
    top_w,
)  # fmt: skip

BIASES = ((BATCH, HEADS, LENGTH), (1, GROUPS, LENGTH), (1, 1, LENGTH))


# masks as tensors


@given(st.sampled_from(sorted(MASKS)), st.sampled_from([LENGTH, 20]))
def test_a_mask_is_what_its_tensors_say(name, queries):
    mask = MASKS[name](LENGTH, queries)
    again = unflatten(*flatten(mask))
    assert type(again) is type(mask) and again.batch == mask.batch
    assert torch.equal(again.dense(), mask.dense())


@given(st.sampled_from(sorted(MASKS)), st.integers(0, 1))
def test_tensors_cut_along_their_heads_are_the_masks_heads(name, half):
    mask = MASKS[name](LENGTH, LENGTH)
    tensors, form = flatten(mask)

    def cut(x, dim):
        return x if dim is None or x.shape[dim] == 1 else x.chunk(2, dim)[half]

    own = [cut(x, head) for x, (_, head) in zip(tensors, dims_of(form), strict=True)]
    expected = cut(mask.dense(), 1)
    assert torch.equal(unflatten(own, form).dense(), expected)


# two ranks


def sharded_cases(cases, _):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))

    def shared(x, dim):
        placement = Replicate() if dim is None or x.shape[dim] == 1 else Shard(dim)
        return distribute_tensor(x, mesh, [placement])

    def same(mask, dims, *bias_shape):
        """Attention of tensors that are cut along ``dims``: those of query, keys and a bias."""
        shapes = [(BATCH, h, LENGTH, DIM) for h in (HEADS, GROUPS, GROUPS)]
        tensors = [drawn(*s, seed=i) for i, s in enumerate([*shapes, *bias_shape])]
        _, lse = dynmask.attention(*tensors[:3], mask, return_lse=True)
        grads = drawn(BATCH, HEADS, LENGTH, DIM, seed=9), drawn(BATCH, HEADS, LENGTH, seed=8)
        grads = grads[0], grads[1] * torch.isfinite(lse)
        results = []
        for place in (lambda x, _: x.clone(), shared):
            own = [
                place(x, dims[min(i, 1)]).detach().requires_grad_() for i, x in enumerate(tensors)
            ]
            out = dynmask.attention(*own[:3], mask, *own[3:], return_lse=True)
            torch.autograd.backward(out, [place(g, dims[0]) for g in grads])
            results.append([*out, *(x.grad for x in own)])
        expected, found = results
        for x, y in zip(found, expected, strict=True):
            assert isinstance(x, DTensor)
            cases.same(x.full_tensor(), y)
        cut = Replicate() if dims[0] is None else Shard(dims[0])
        assert found[0].placements == found[2].placements == (cut,)

    for what, dim in {"heads": 1, "rows": 0, "nothing": None}.items():
        for name, make in MASKS.items():
            if (name, dim) != ("placed", 0):
                with cases.case(f"{what} {name}"):
                    same(make(LENGTH, LENGTH), (dim, dim))
        for shape in BIASES:
            with cases.case(f"{what} bias {shape}"):
                same(top_w(LENGTH, LENGTH), (dim, dim), shape)
    with cases.case("a plain bias"), torch.no_grad():
        q, k = (drawn(BATCH, h, LENGTH, DIM) for h in (HEADS, GROUPS))
        bias, mask = drawn(1, GROUPS, LENGTH), top_w(LENGTH, LENGTH)
        out = dynmask.attention(shared(q, 1), *[shared(k, 1)] * 2, mask, bias)
        cases.same(out.full_tensor(), dynmask.attention(q, k, k, mask, bias))
    for number, what in enumerate(("out", "lse")):
        with cases.case(f"gradient of {what} alone"):
            results = []
            for place in (lambda x, _: x.clone(), shared):
                own = [place(x, 1).detach().requires_grad_() for x in (q, k, k)]
                dynmask.attention(*own, mask, return_lse=True)[number].sum().backward()
                results.append([x.grad for x in own[: 3 - number]])
            for x, y in zip(*results, strict=True):
                cases.same(y.full_tensor(), x)
    refusals(cases, shared)


def refusals(cases, shared):
    q, k = (drawn(BATCH, h, LENGTH, DIM) for h in (HEADS, GROUPS))
    mask = LifetimeMask.causal(LENGTH)
    with cases.case("refuses: plain key"):
        dynmask.attention(shared(q, 1), k, k, mask)
    with cases.case("refuses: positions"):
        x = shared(k[..., :36, :], 2)
        dynmask.attention(x, x, x, LifetimeMask.causal(36))
    with cases.case("refuses: odd heads"):
        dynmask.attention(shared(q[:, :3], 1), *[shared(k[:, :1], None)] * 2, mask)
    with cases.case("refuses: packed rows"):
        dynmask.attention(shared(q, 0), *[shared(k, 0)] * 2, MASKS["placed"](LENGTH, LENGTH))
    with cases.case("refuses: reference"):
        dynmask.attention(shared(q, 1), *[shared(k, 1)] * 2, mask, impl="reference")
    with cases.case("refuses: plan"):
        plan = mask.expand(BATCH).lower()
        dynmask.attention(shared(q, 1), *[shared(k, 1)] * 2, plan)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return found_by(sharded_cases, tmp_path_factory.mktemp("ranks"))


def test_two_ranks_are_one_process(found):
    for cases in found:
        results = {k: v for k, v in cases.items() if not k.startswith("refuses")}
        assert len(results) == 3 * (len(MASKS) + len(BIASES)) + 2
        assert not {k: v for k, v in results.items() if not isinstance(v, float) or v > TOLERANCE}


REFUSALS = {
    "plain key": "key: expected a DTensor of the query's mesh, received a plain tensor",
    "positions": r"query: expected replicated, .* received S.*context_attention",
    "odd heads": r"heads and kv heads that 2 ranks share evenly, received \[1, 3\]",
    "packed rows": "mask: expected one whose batch rows can be cut, received a packed",
    "reference": "impl: expected one of auto, cpu, triton for DTensors, received reference",
    "plan": "mask_or_plan: expected a mask for DTensors, received Plan",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_no_rule_is_about_is_refused(found, name):
    for cases in found:
        with pytest.raises(ValueError, match=REFUSALS[name]):
            raise ValueError(cases[f"refuses: {name}"])
