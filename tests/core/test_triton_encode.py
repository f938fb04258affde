"""The Triton kernel makes records as `BlockCodec.encode` does, on a GPU if there is one, else interpreted."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from paged_requests import Shape, generator, random_tokens
from torch import Tensor
from triton_device import DEVICE, HAS_GPU

from turboquant_core.block_codec import BlockCodec
from turboquant_core.block_quantizer import KEY_SCALE, VALUE_SCALE, BlockQuantizer, EncodedBlocks
from turboquant_core.kernels import triton_encode
from turboquant_core.record import RecordLayout
from turboquant_core.transform import Transform, balanced, rotation

HEADS = 2

# The interpreter computes in NumPy, which warns of what becomes NaN or inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BITS = (2, 3, 4, 8)
DIMS = (16, 64, 80, 96, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class States(NamedTuple):
    """Keys and values of blocks, ``[num_blocks, num_kv_heads, 64, dim]``."""

    keys: Tensor
    values: Tensor

    def to(self, dtype: torch.dtype) -> States:
        return States(self.keys.to(dtype), self.values.to(dtype))

    def times(self, factors: Tensor | float) -> States:
        return States(self.keys * factors, self.values * factors)


def make_states(codec: BlockCodec, num_blocks: int = 1, seed: int = 0) -> States:
    shape = Shape(HEADS, 1, codec.key_quantizer.dim, codec.value_quantizer.dim)
    tokens = random_tokens(shape, 64 * num_blocks, seed)
    return States(
        *(states.unflatten(0, (num_blocks, 64)).transpose(1, 2) for states in (tokens.keys, tokens.values))
    )


def encode_blocks(
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    starts: Tensor,
    records: Tensor,
    ids: Tensor,
    codec: BlockCodec,
) -> None:
    """Make blocks of a single layer."""
    triton_encode.encode_blocks(keys[None], values[None], rows, starts, records[None], ids, [codec])


def rotated(
    key_bits: int, value_bits: int, key_dim: int, value_dim: int, key_transform: Transform | None = None
) -> BlockCodec:
    return BlockCodec(
        BlockQuantizer(key_dim, key_bits, scale=KEY_SCALE, transform=key_transform),
        BlockQuantizer(value_dim, value_bits, scale=VALUE_SCALE),
    )


def poisoned_records(codec: BlockCodec, num_records: int) -> Tensor:
    return torch.full((num_records, HEADS, codec.record_bytes), 255, dtype=torch.uint8, device=DEVICE)


def encoded(codec: BlockCodec, states: States) -> Tensor:
    """Return the records that the kernel makes, on the CPU."""
    num_blocks = len(states.keys)
    records = poisoned_records(codec, num_blocks)
    ids = torch.arange(num_blocks, device=DEVICE)
    keys, values = (tensor.to(DEVICE) for tensor in states)
    encode_blocks(keys, values, ids, torch.zeros_like(ids), records, ids, codec)
    return records.cpu()


def expected(codec: BlockCodec, states: States) -> Tensor:
    return codec.encode(*(tensor.transpose(0, 1) for tensor in states)).transpose(0, 1)


def errors(codec: BlockCodec, records: Tensor, states: States) -> list[Tensor]:
    """Return how far decoded keys and values are from the true ones: float64 ``[num_blocks, heads, 64]``."""
    decoded = codec.decode(records.transpose(0, 1))
    return [
        (numbers.transpose(0, 1).double() - true.double()).norm(dim=-1)
        for numbers, true in zip(decoded, states, strict=True)
    ]


def check(codec: BlockCodec, states: States, *, least_equal: float = 0.99) -> Tensor:
    """Encode blocks, and return records whose errors are at most 1% above the reference's."""
    records, reference = encoded(codec, states), expected(codec, states)
    assert (records == reference).double().mean() >= least_equal
    for ours, theirs in zip(errors(codec, records, states), errors(codec, reference, states), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
        assert (ours.norm(dim=-1) <= 1.01 * theirs.norm(dim=-1)).all()
        assert (ours <= 1.5 * theirs).all()  # a token may lose more, by other codes that are as good
    return records


@pytest.mark.parametrize("case", range(24))
def test_blocks_are_kept_as_well_as_by_the_reference(case: int) -> None:
    """Of keys and of values, all 24 pairs of bits and dimension; all 16 pairs of bits."""
    codec = rotated(BITS[case // 6], BITS[case % 4], DIMS[case % 6], DIMS[case // 4])
    check(codec, make_states(codec, seed=case).to(DTYPES[case % 3]))


@pytest.mark.parametrize(("bits", "dims"), [((4, 3), (128, 64)), ((2, 8), (80, 24)), ((8, 4), (40, 96))])
def test_heads_may_have_transforms_of_their_own(bits: tuple[int, int], dims: tuple[int, int]) -> None:
    numbers = generator(5)
    factors = [
        torch.randn(HEADS, dim, dim, generator=numbers, dtype=torch.float64) for dim in (*dims, dims[0])
    ]
    moments = [factor @ factor.mT for factor in factors]
    codec = BlockCodec(
        BlockQuantizer(dims[0], bits[0], scale=KEY_SCALE, transform=balanced(moments[0], moments[2], 1)),
        BlockQuantizer(dims[1], bits[1], scale=VALUE_SCALE, transform=balanced(moments[1], None, 2)),
    )
    check(codec, make_states(codec, num_blocks=2))


@pytest.mark.parametrize("bits", [(2, 4), (3, 2), (8, 3), (4, 8)])
def test_what_pads_a_record_is_zero(bits: tuple[int, int]) -> None:
    codec = rotated(*bits, 24, 40)
    ones = torch.tensor(-1, dtype=torch.int16).view(torch.float16)
    keys, values = (
        EncodedBlocks(  # the lowest code has all bits set but that of 8 bits
            codes=torch.full((64, quantizer.dim), 255 if quantizer.bits == 8 else 0, dtype=torch.uint8),
            norms=ones.expand(64),
            means=torch.full((quantizer.dim,), -1, dtype=torch.int8),
            mean_steps=ones,
        )
        for quantizer in (codec.key_quantizer, codec.value_quantizer)
    )
    used = RecordLayout(24, bits[0], 40, bits[1]).write(keys, values)
    assert (used == 0).any()
    assert not (check(codec, make_states(codec)) & ~used).any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_negative_id_is_of_no_record(dtype: torch.dtype) -> None:
    codec = rotated(4, 3, 64, 16)
    states = make_states(codec, num_blocks=2)
    records = poisoned_records(codec, 5)
    encode_blocks(
        *(tensor.to(DEVICE) for tensor in states),
        torch.tensor([10**9, 1, 10**9, 0], dtype=dtype, device=DEVICE),
        torch.tensor([10**9, 0, 10**9, 0], dtype=dtype, device=DEVICE),
        records,
        torch.tensor([-1, 3, -7, 0], dtype=dtype, device=DEVICE),
        codec,
    )
    assert torch.equal(records[[0, 3]].cpu(), encoded(codec, states))
    assert (records[[1, 2, 4]] == 255).all()


def test_no_blocks_are_no_records() -> None:
    codec = rotated(4, 4, 16, 16)
    records = poisoned_records(codec, 1)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    encode_blocks(*(tensor.to(DEVICE) for tensor in make_states(codec)), none, none, records, none, codec)
    assert (records == 255).all()


def test_tokens_lie_in_any_rows_at_any_places() -> None:
    codec = rotated(4, 3, 64, 80)
    states = make_states(codec, num_blocks=3)
    held = []
    for tensor in states:
        slots = torch.full((4, HEADS, 200, tensor.shape[-1]), torch.nan)
        slots[2, :, 5:133] = tensor[:2].transpose(0, 1).flatten(1, 2)
        slots[0, :, 136:] = tensor[2]
        held.append(slots.to(DEVICE))
    records = poisoned_records(codec, 3)
    rows, starts, ids = torch.tensor([[2, 2, 0], [69, 5, 136], [1, 0, 2]], device=DEVICE)
    encode_blocks(*held, rows, starts, records, ids, codec)
    assert torch.equal(records.cpu(), encoded(codec, states))


def test_strides_may_be_any() -> None:
    codec = rotated(3, 4, 80, 64)
    states = make_states(codec, num_blocks=2)
    new = []
    for tensor in states:  # tokens after tokens, of which each has other numbers in between
        wide = torch.full((130, HEADS + 1, 2 * tensor.shape[-1] + 3), torch.nan)
        view = wide[1:129, 1:, 1:-2:2]
        view.copy_(tensor.transpose(1, 2).flatten(0, 1))
        new.append(wide.to(DEVICE)[1:129, 1:, 1:-2:2].transpose(0, 1).unsqueeze(0))
    records = poisoned_records(codec, 2)
    rows, starts, ids = torch.tensor([[0, 0], [0, 64], [0, 1]], device=DEVICE)
    encode_blocks(*new, rows, starts, records, ids, codec)
    assert torch.equal(records.cpu(), encoded(codec, states))


@pytest.mark.parametrize("bits", [(2, 3), (4, 8)])
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_tokens_that_are_not_finite_spoil_themselves_alone(bits: tuple[int, int], number: float) -> None:
    codec = rotated(*bits, 64, 80)
    states = make_states(codec)
    for tensor in states:
        tensor[0, 0, 5:25, 3] = number
        tensor[0, 1, 32:] = number
    # Codes of such tokens are whatever they are.
    records = check(codec, states, least_equal=0.5)
    for ours in errors(codec, records, states):
        assert int(ours.isnan().sum()) == 52
    spoiled = encoded(codec, states)
    for tensor in states:
        tensor[0, 0, 5:25] = 0
    assert torch.equal(spoiled[0, 1], encoded(codec, states)[0, 1])


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float16, 1e4),
        (torch.float16, 1e-6),
        (torch.bfloat16, 1e30),
        (torch.float32, 1e37),
        (torch.float32, 1e6),
        (torch.float32, 1e-6),
        (torch.float32, 1e-38),
    ],
)
def test_numbers_may_be_of_any_size(dtype: torch.dtype, size: float) -> None:
    codec = rotated(4, 8, 64, 16)
    # Below what norms can be, codes are whatever they are.
    check(codec, make_states(codec).times(size).to(dtype), least_equal=0.99 if size > 1e-9 else 0)


def test_tokens_of_one_block_may_have_sizes_of_their_own() -> None:
    codec = rotated(2, 8, 64, 16)
    factors = 10.0 ** torch.randint(-12, 4, (HEADS, 64, 1), generator=generator(3))
    factors[:, 7], factors[1, 40] = 0, 1e30
    check(codec, make_states(codec).times(factors), least_equal=0.9)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_zeros_stay_zeros_whatever_the_transform(size: float) -> None:
    to, back, _ = rotation(64, 0).matrices(torch.device("cpu"))
    codec = rotated(4, 8, 64, 16, Transform(size * to.mT, back.mT / size))
    states = make_states(codec)
    for tensor in states:
        tensor[:, 0] = 0
    for decoded in codec.decode(check(codec, states)):
        assert not decoded[:, 0].any()


@pytest.mark.parametrize(("bits", "dtype"), [((2, 8), torch.float32), ((4, 3), torch.float16)])
def test_an_offset_that_tokens_share_takes_no_precision(bits: tuple[int, int], dtype: torch.dtype) -> None:
    codec = rotated(*bits, 128, 64)
    offsets = [600 * torch.randn(HEADS, 1, dim, generator=generator(dim)) for dim in (128, 64)]
    check(codec, States(*(a + b for a, b in zip(make_states(codec), offsets, strict=True))).to(dtype))


def test_rounding_does_not_choose_levels_whose_norm_is_too_large() -> None:
    """A rotation of 128 dimensions makes numbers of the same size of one: all levels point as well."""
    codec = rotated(2, 2, 128, 128)
    states = make_states(codec).times(0)
    for tensor in states:
        tensor[..., 3] = 3e4 * (1 + torch.rand(HEADS, 64, generator=generator(8)))
        tensor[..., ::2, :] *= -1
    for ours, true in zip(errors(codec, encoded(codec, states), states), states, strict=True):
        assert (ours < 1e-3 * true.norm(dim=-1)).all()


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_a_graph_replays_with_other_blocks() -> None:
    codec = rotated(4, 4, 128, 128)
    states = make_states(codec, num_blocks=2)
    keys, values = (tensor.to(DEVICE, torch.bfloat16) for tensor in states)
    rows = torch.arange(2, device=DEVICE)
    starts, ids = torch.zeros_like(rows), rows.clone()
    records = poisoned_records(codec, 3)
    encode_blocks(keys, values, rows, starts, records, ids, codec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        encode_blocks(keys, values, rows, starts, records, ids, codec)
    records.fill_(255)
    ids.copy_(torch.tensor([2, -1]))
    graph.replay()
    assert torch.equal(records[2].cpu(), encoded(codec, states.to(torch.bfloat16))[0])
    assert (records[:2] == 255).all()
