"""The Triton kernels of a sampling step beside fp64 references. Run by `test_triton.py`."""

import pytest
import torch

from grpo.kernels import add_rms_norm, cached_attention, linear_add, norm_linear, silu_mul
from grpo.kernels.block_sizes import trying
from grpo.kernels.triton_cached_attention import kernel_options

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()  # the interpreter gets it wrong
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def cache_case(B, n_head, n_kv_head, head_dim, length, row, *, dtype=torch.float32):
    """Inputs of `cached_attention`; rows of the cache that nobody may read are NaN."""
    keys, values = (random(B, n_kv_head, length, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    keys[:, :, row:], values[:, :, row:] = torch.nan, torch.nan
    angles = random(length, head_dim // 2, seed=3)
    rotary = torch.stack([angles.cos(), angles.sin()], dim=-1)
    qkv = random(B, (n_head + 2 * n_kv_head) * head_dim, dtype=dtype, seed=4)
    return qkv, keys, values, torch.tensor([row], device=DEVICE), rotary


def attend(qkv, keys, values, row, rotary, impl, first_weight=None):
    """Result, and the cache's rows that are filled now; the reference sees zeros in place of what is hidden."""
    keys, values = keys.clone(), values.clone()
    if impl == "reference":
        keys, values = keys.nan_to_num(0), values.nan_to_num(0)
    out = cached_attention(qkv, keys, values, row=row, rotary=rotary, first_weight=first_weight, impl=impl)
    filled = int(row) + 1
    return out, keys[:, :, int(row) : filled], values[:, :, int(row) : filled]


def assert_as_good_as_torch(actual, reference, truth):
    """The kernels' error may not exceed that of the torch reference by more than a tolerance."""
    for ours, theirs, true in zip(actual, reference, truth, strict=True):
        assert ours.dtype == theirs.dtype
        allowed = (theirs - true).abs().max() + TOLERANCE[ours.dtype] * max(1, true.abs().max())
        torch.testing.assert_close(ours.double(), true, atol=float(allowed), rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "n_head", "n_kv_head", "head_dim", "length", "row"),
    [
        (2, 3, 3, 64, 300, 0),  # the first row attends to itself
        (2, 3, 3, 64, 300, 127),  # a full split
        (2, 3, 3, 64, 300, 128),  # the new row alone in its split
        (3, 2, 2, 64, 300, 299),  # a ragged last split
        (2, 4, 2, 48, 200, 171),  # grouped queries, a head that is no power of two
        (3, 4, 1, 100, 130, 129),
        (1, 2, 2, 128, 577, 576),
        (2, 2, 2, 8, 16, 9),
    ],
)
def check_attention(B, n_head, n_kv_head, head_dim, length, row, dtype):
    case = cache_case(B, n_head, n_kv_head, head_dim, length, row, dtype=dtype)
    qkv, keys, values, row, rotary = case
    truth = attend(qkv.double(), keys.double(), values.double(), row, rotary, "reference")
    assert_as_good_as_torch(attend(*case, "triton"), attend(*case, "reference"), truth)


@pytest.mark.parametrize(("length", "row"), [(20, 0), (20, 7), (300, 299)])
def check_a_first_row_that_stands_for_many(length, row):
    """As if row 0 stood there so many times."""
    qkv, keys, values, row, rotary = cache_case(2, 4, 2, 16, length, row)
    counts = torch.tensor([3.0, 120.0], device=DEVICE)
    weighed = attend(qkv, keys, values, row, rotary, "triton", counts)
    truth = attend(qkv.double(), keys.double(), values.double(), row, rotary, "reference", counts)
    assert_as_good_as_torch(weighed, attend(qkv, keys, values, row, rotary, "reference", counts), truth)
    if int(row):
        for sequence, count in enumerate(counts.int().tolist()):
            many = [torch.cat([x[:, :, :1].expand(-1, -1, count - 1, -1), x], dim=2) for x in (keys, values)]
            angles = torch.cat([rotary[:1].expand(count - 1, -1, -1), rotary])
            out = attend(qkv, *many, row + count - 1, angles, "reference")[0]
            torch.testing.assert_close(weighed[0][sequence], out[sequence])


def check_attention_writes_one_row():
    qkv, keys, values, row, rotary = cache_case(2, 4, 2, 48, 40, 21)
    before = keys.clone(), values.clone()
    cached_attention(qkv, keys, values, row=row, rotary=rotary, impl="triton")
    for old, new in zip(before, (keys, values), strict=True):
        same = (old == new) | (old.isnan() & new.isnan())
        assert same.all(dim=(0, 1, 3)).logical_not().nonzero().flatten().tolist() == [21]


def check_attention_of_a_row_does_not_depend_on_the_batch():
    """Over several splits, again and again: the counters of arrived programs are back at 0."""
    case = cache_case(5, 4, 2, 64, 400, 390)
    whole = attend(*case, "triton")
    assert kernel_options(4, 2, 64, 400, False)["SPLITS"] > 2
    for part in (slice(0, 2), slice(2, 5)):
        qkv, keys, values, row, rotary = case
        again = attend(qkv[part], keys[part], values[part], row, rotary, "triton")
        for one, all_of_them in zip(again, whole, strict=True):
            assert torch.equal(one, all_of_them[part])


def check_attention_reads_strided_inputs():
    """A layer of a larger cache, and a product with other columns beside it."""
    qkv, keys, values, row, rotary = cache_case(2, 2, 2, 16, 32, 20)
    expected = attend(qkv, keys, values, row, rotary, "triton")
    wide = torch.cat([qkv, qkv], dim=1)[:, : qkv.shape[1]]
    long = [torch.cat([tensor, tensor], dim=2)[:, :, :32] for tensor in (keys, values)]
    out = cached_attention(wide, *long, row=row, rotary=rotary, impl="triton")
    assert torch.equal(out, expected[0])
    assert torch.equal(long[0][:, :, 20:21], expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("N", "D"), [(1, 64), (5, 100), (3, 1536)])
def check_norm(N, D, with_residual, dtype):
    x, residual, weight = 3 * random(N, D, dtype=dtype), random(N, D, dtype=dtype, seed=1), random(D, dtype=dtype)
    inputs = x, residual if with_residual else None, weight

    def run(impl, *tensors):
        return add_rms_norm(*tensors, eps=1e-5, impl=impl)

    truth = run("reference", *(None if tensor is None else tensor.double() for tensor in inputs))
    assert_as_good_as_torch(run("triton", *inputs), run("reference", *inputs), truth)
    assert torch.equal(run("triton", *inputs)[1], run("reference", *inputs)[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "F"), [(1, 64), (5, 100), (3, 3000)])
def check_gate(N, F, dtype):
    gate, up = (8 * random(N, 2 * F, dtype=dtype)).chunk(2, dim=1)
    truth = silu_mul(gate.double(), up.double(), impl="reference")
    assert_as_good_as_torch([silu_mul(gate, up, impl="triton")], [silu_mul(gate, up, impl="reference")], [truth])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "K", "D", "splits"), [(1, 16, 16, 1), (5, 100, 40, 4), (16, 600, 48, 1), (16, 600, 48, 3), (18, 64, 33, 2)]
)
def check_product_with_residual_and_norm(N, K, D, splits, dtype):
    """The stream and its sums of squares, then the products that take them up, with and without a gate."""
    x, residual, weight = random(N, K, dtype=dtype), random(N, D, dtype=dtype, seed=1), random(D, K, dtype=dtype) / 8
    norm, gate, up = (random(*shape, dtype=dtype, seed=2) for shape in ((D,), (K, D), (K, D)))

    def run(impl, x, weight, residual, norm, gate, up):
        total, squares = linear_add(x, weight, residual, impl=impl)
        one, two = (norm_linear(total, squares, norm, *w, eps=1e-5, impl=impl) for w in ((gate,), (gate, up)))
        return total, squares, one, two

    inputs = x, weight, residual, norm, gate, up
    truth = run("reference", *(tensor.double() for tensor in inputs))
    with trying("linear_add", {"TILE_K": 64, "num_warps": 1, "num_stages": 2, "SPLITS": splits}):
        assert_as_good_as_torch(run("triton", *inputs), run("reference", *inputs), truth)


def check_products_of_a_row_do_not_depend_on_the_batch():
    """Whole numbers, whose products are exact: the interpreter's own product rounds by the place in a tile."""
    x, weight, residual = (random(*shape, seed=9).mul(2).round() for shape in ((20, 64), (32, 64), (20, 32)))
    total, squares = linear_add(x, weight, residual, impl="triton")
    one, one_squares = linear_add(x[3:5], weight, residual[3:5], impl="triton")
    assert torch.equal(one, total[3:5])
    assert torch.equal(one_squares, squares[3:5])


def check_no_rows():
    qkv, keys, values, row, rotary = cache_case(0, 2, 2, 16, 32, 20)
    assert cached_attention(qkv, keys, values, row=row, rotary=rotary, impl="triton").shape == (0, 32)
    assert add_rms_norm(random(0, 8), random(0, 8), random(8), eps=1e-5, impl="triton")[1].shape == (0, 8)
    assert silu_mul(random(0, 8), random(0, 8), impl="triton").shape == (0, 8)
    total, squares = linear_add(random(0, 8), random(40, 8), random(0, 40), impl="triton")
    assert norm_linear(total, squares, random(40), random(7, 40), eps=1e-5, impl="triton").shape == (0, 7)
