r"""A residual U-Net in one, two or three dimensions, with optional self-attention and conditions.

The backbone of Ho et al. 2020 (arXiv 2006.11239, appendix B) with the scale-and-shift embedding of Nichol and
Dhariwal 2021 (arXiv 2102.09672):

    block(h, e) = shortcut(h) + conv(dropout(silu((1 + scale(e)) norm(conv(silu(norm(h)))) + shift(e))))

where e = MLP(sinusoids(time_scale t)) + class embedding + MLP(vector). It is cheaper than the original in two places.
Every block of the way down has one partner on the way up (not blocks + 1). A 1x1 convolution changes the channels
before up-sampling, with which nearest-neighbour up-sampling commutes.

On a CPU in bfloat16, keep the default memory format: channels_last makes the convolutions a fifth faster but
GroupNorm seven to ten times slower (torch 2.14), which costs a quarter of the speed of a training step.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention, silu

from ddpm_lightning.networks.arguments import at_least, positive
from ddpm_lightning.networks.conditions import check_conditions
from ddpm_lightning.networks.convolutions import CONVOLUTIONS
from ddpm_lightning.networks.embedding import FourierFeatures, SinusoidalEmbedding
from ddpm_lightning.networks.patches import from_patches, to_patches

__all__ = ["UNet"]

M = TypeVar("M", bound=nn.Module)


class UNet(nn.Module):
    """Residual U-Net: (x ``[B, C, *space]``, t ``[B]``) to ``[B, out_channels, *space]``. Its output is 0 at first.

    Level i works at 1 / (patch 2**i) of the image's resolution with ``width * multipliers[i]`` channels. The last
    convolution of every residual branch and of the network starts at zero, so every block starts as its shortcut.

    Args:
        channels: image channels C of the input; None for 1, and on the command line for the data's.
        width: channels of a level whose multiplier is 1.
        multipliers: channels of each level in units of ``width``, the finest level 0 first.
        blocks: residual blocks of each level on the way down, and as many on the way up; one number for all levels
            or one for each. Fewer at level 0 is cheaper at nearly the same number of parameters.
        attention: levels whose blocks end in self-attention; with the last level the middle too.
        heads: attention heads; must divide the channels of the levels with attention. One, as in Ho et al. 2020: on
            a CPU in bfloat16, the cost of few pixels grows with the number of heads.
        dropout: probability of dropping an activation in a residual branch, in [0, 1).
        num_classes: number of classes K of a conditional network; None for an unconditional one, and on the command
            line for the data's where the model is class-conditional. Labels are 0..K-1, and K stands for "no class".
        out_channels: channels of the output; None for ``channels``, and on the command line for as many as the variance
            needs. Use ``2 * channels`` to predict a variance too.
        time_scale: factor on t before the sinusoids: the inverse of the smallest difference in t that matters.
        fourier: frequencies, in cycles per unit of x, of sines and cosines of the input that join it
            (:class:`FourierFeatures`). They show the network noise that is far smaller than the image. A likelihood
            depends on this noise, samples do not. For L grey levels on [-1, 1] the frequency (L - 1) / 2 has the
            period of one level.
        dims: dimensions of space, 1 to 3; None for 2, and on the command line for the data's.
        padding: what convolutions see beyond the edge: "zeros", or "circular" for periodic lattices. With "circular"
            the network commutes with shifts of its input by the total stride ``patch * 2 ** (len(multipliers) - 1)``,
            to rounding.
        vector_size: numbers in a condition ``vector``; None for none, and on the command line for the data's where the
            model is told it.
        field_channels: channels of a condition ``field``, which joins the input; None as for the vector.
        vector_scale: ``mean`` and ``std`` of each number of the vector, by which it is standardised; None for 0 and 1,
            and on the command line for those of the training data.
        patch: side of the patches whose pixels become the channels of one pixel; 1 for none. With 2 a network for
            images costs a quarter, and good samples come sooner (docs/quality.md); the configurations for likelihood
            do without.
    """

    def __init__(
        self,
        channels: int | None = None,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int | Sequence[int] = 2,
        attention: Sequence[int] = (),
        heads: int = 1,
        dropout: float = 0.0,
        num_classes: int | None = None,
        out_channels: int | None = None,
        time_scale: float = 1000.0,
        fourier: Sequence[float] = (),
        dims: int | None = None,
        padding: Literal["zeros", "circular"] = "zeros",
        vector_size: int | None = None,
        field_channels: int | None = None,
        vector_scale: Mapping[str, Sequence[float]] | None = None,
        patch: int = 1,
    ) -> None:
        super().__init__()
        channels = 1 if channels is None else channels
        # the argument itself: None in the checkpoints of pictures, those of older versions among them
        self.dims, self._space_dims = dims, 2 if dims is None else dims
        self.padding, self.vector_size, self.field_channels = padding, vector_size, field_channels
        self.vector_scale = vector_scale
        self.channels, self.out_channels, self.num_classes = channels, out_channels, num_classes
        self.width, self.multipliers, self.blocks = width, multipliers, blocks
        self.attention, self.heads, self.dropout = attention, heads, dropout
        self.time_scale, self.fourier, self.patch = time_scale, fourier, patch
        counts = [blocks] * len(multipliers) if isinstance(blocks, int) else list(blocks)
        self._check_arguments(counts)
        widths = [width * multiplier for multiplier in multipliers]
        levels = range(len(widths))
        embedding_width = 4 * width

        conv = CONVOLUTIONS[padding][self._space_dims]

        def block(inputs: int, outputs: int, level: int) -> _Block:
            return _Block(conv, inputs, outputs, embedding_width, dropout, heads if level in attention else None)

        self.sinusoids = SinusoidalEmbedding(embedding_width, scale=time_scale)
        self.time_mlp = nn.Sequential(
            nn.Linear(embedding_width, embedding_width), nn.SiLU(), nn.Linear(embedding_width, embedding_width)
        )
        self.label_embedding = None if num_classes is None else nn.Embedding(num_classes + 1, embedding_width)
        self.features = FourierFeatures(fourier)
        # a condition field and whether it is there
        given = 0 if field_channels is None else field_channels + 1
        pixels = patch**self._space_dims
        self.stem = conv((channels * self.features.copies + given) * pixels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            nn.ModuleList(block(widths[i], widths[i], i) for _ in range(counts[i])) for i in levels
        )
        self.shrink = nn.ModuleList(conv(widths[i], widths[i + 1], 3, stride=2, padding=1) for i in levels[:-1])
        self.middle = nn.ModuleList([block(widths[-1], widths[-1], levels[-1])])
        self.grow = nn.ModuleList(conv(widths[i + 1], widths[i], 1) for i in levels[:-1])
        self.up = nn.ModuleList(
            nn.ModuleList(block(2 * widths[i], widths[i], i) for _ in range(counts[i])) for i in levels
        )
        self.out_norm = _group_norm(widths[0])
        self.out_conv = _zeroed(conv(widths[0], (out_channels or channels) * pixels, 3, padding=1))
        self.vector_mlp: nn.Module | None = None
        if vector_size is not None:
            moments = vector_scale or {"mean": [0.0] * vector_size, "std": [1.0] * vector_size}
            for name in ("mean", "std"):
                self.register_buffer(f"_vector_{name}", torch.tensor(moments[name]), persistent=False)
            # the vector and whether it is there
            self.vector_mlp = nn.Sequential(
                nn.Linear(vector_size + 1, embedding_width), nn.SiLU(), nn.Linear(embedding_width, embedding_width)
            )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        label: Tensor | None = None,
        vector: Tensor | None = None,
        field: Tensor | None = None,
    ) -> Tensor:
        """``[B, out_channels, *space]`` in the dtype of ``x``, under autocast too.

        Args:
            x: images ``[B, C, *space]``; each size is divisible by ``patch * 2 ** (len(multipliers) - 1)``.
            t: one real number for each image, ``[B]``.
            label: classes ``[B]``, int64, in 0..num_classes; None (or ``num_classes``) is "no class".
            vector: conditions ``[B, vector_size]``; None, or a row with NaN, is "no vector".
            field: conditions ``[B, field_channels, *space]``; None, or a row with NaN, is "no field".
        """
        self._check_inputs(x, t, {"label": label, "vector": vector, "field": field})
        embedding: Tensor = silu(self._embed(x, t, label, vector))
        h = self.features(x)
        if self.field_channels is not None:
            h = torch.cat((h, _with_presence(field, (x.shape[0], self.field_channels, *x.shape[2:]), x)), dim=1)
        h = self.stem(to_patches(h, self.patch))
        skips: list[Tensor] = []
        for level, stage in enumerate(self.down):
            for block in cast(nn.ModuleList, stage):
                h = block(h, embedding)
                skips.append(h)
            if level < len(self.shrink):
                h = self.shrink[level](h)
        for block in self.middle:
            h = block(h, embedding)
        for level in reversed(range(len(self.up))):
            if level < len(self.grow):
                h = interpolate(self.grow[level](h), scale_factor=2.0, mode="nearest")
            for block in cast(nn.ModuleList, self.up[level]):
                h = block(torch.cat((h, skips.pop()), dim=1), embedding)
        h = from_patches(self.out_conv(silu(self.out_norm(h))), self.patch)
        return self._output(h, x, embedding).to(x.dtype)

    def _output(self, h: Tensor, x: Tensor, embedding: Tensor) -> Tensor:
        """What is returned, from the last convolution's ``[B, out_channels, *space]``."""
        return h

    def _embed(self, x: Tensor, t: Tensor, label: Tensor | None, vector: Tensor | None) -> Tensor:
        embedding: Tensor = self.time_mlp(self.sinusoids(t).to(x.dtype))
        if self.num_classes is not None and self.label_embedding is not None:
            if label is None:
                label = torch.full_like(t, self.num_classes, dtype=torch.int64)
            embedding = embedding + self.label_embedding(label)
        if self.vector_mlp is not None:
            if vector is not None:
                mean, std = self.get_buffer("_vector_mean"), self.get_buffer("_vector_std")
                vector = (vector - mean) / std
            embedding = embedding + self.vector_mlp(_with_presence(vector, (x.shape[0], self.vector_size or 0), x))
        return embedding

    def _check_arguments(self, counts: Sequence[int]) -> None:
        levels = len(self.multipliers)
        at_least(1, channels=self.channels, width=self.width, patch=self.patch, heads=self.heads)
        for name, entries in {"multipliers": self.multipliers, "blocks": counts or [1]}.items():
            if min(entries, default=0) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must hold numbers that are 1 or more")
        if len(counts) != levels:
            raise ValueError(f"blocks has {len(counts)} entries for {levels} levels (multipliers): give one for each")
        for level in self.attention:
            if not 0 <= level < levels:
                raise ValueError(f"attention names level {level}, but the levels are 0..{levels - 1}")
            if self.width * self.multipliers[level] % self.heads:
                raise ValueError(
                    f"heads={self.heads} must divide the {self.width * self.multipliers[level]} channels of level "
                    f"{level}, which has attention"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout:g} must lie in [0, 1)")
        positive(time_scale=self.time_scale)
        if self._space_dims not in (1, 2, 3):
            raise ValueError(f"dims = {self.dims} must be 1, 2 or 3")
        if self.padding not in CONVOLUTIONS:
            raise ValueError(f"padding = {self.padding} must be zeros or circular")
        optional = {
            name: getattr(self, name) for name in ("num_classes", "out_channels", "vector_size", "field_channels")
        }
        at_least(1, **{name: value for name, value in optional.items() if value is not None})
        if self.vector_scale is not None:
            lengths = [len(self.vector_scale.get(name, ())) for name in ("mean", "std")]
            if lengths != [self.vector_size] * 2 or not all(std > 0 for std in self.vector_scale["std"]):
                raise ValueError(
                    f"vector_scale must hold mean and std, {self.vector_size} numbers each (vector_size), and each std "
                    f"positive; got {dict(self.vector_scale)}"
                )

    def _check_inputs(self, x: Tensor, t: Tensor, given: Mapping[str, Tensor | None]) -> None:
        """Raise a ValueError for a wrong shape; no value is read, so a GPU is not waited for."""
        if x.ndim != 2 + self._space_dims or x.shape[1] != self.channels:
            space = ["L", "H, W", "D, H, W"][self._space_dims - 1]
            raise ValueError(
                f"expected x of shape [B, {self.channels}, {space}], got {list(x.shape)}: the network has "
                f"dims = {self._space_dims} and channels = {self.channels}"
            )
        divisor = self.patch * 2 ** (len(self.multipliers) - 1)
        if any(size % divisor for size in x.shape[2:]):
            ways = ["fewer multipliers (each one after the first halves the size)"] if len(self.multipliers) > 1 else []
            ways += ["a smaller patch"] if self.patch > 1 else []
            raise ValueError(
                f"the image's size {' x '.join(map(str, x.shape[2:]))} is not divisible by {divisor}: pad the images, "
                f"or give {' or '.join(ways)}"
            )
        if t.shape != x.shape[:1]:
            raise ValueError(f"expected t of shape [{x.shape[0]}], one for each image, got {list(t.shape)}")
        # no len(x), by which an exported graph would have one batch size
        count, vector, field = x.shape[0], self.vector_size, self.field_channels
        shapes = {
            "label": None if self.num_classes is None else (count,),
            "vector": None if vector is None else (count, vector),
            "field": None if field is None else (count, field, *x.shape[2:]),
        }
        check_conditions(given, shapes)


class _Block(nn.Module):
    """Residual block with scale-and-shift conditioning, then self-attention if ``heads`` is given.

    ``forward(h [B, inputs, *space], embedding [B, embedding]) -> [B, outputs, *space]``
    """

    def __init__(
        self,
        conv: Callable[..., nn.Module],
        inputs: int,
        outputs: int,
        embedding: int,
        dropout: float,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = _group_norm(inputs)
        self.conv1 = conv(inputs, outputs, 3, padding=1)
        self.scale_shift = nn.Linear(embedding, 2 * outputs)
        self.norm2 = _group_norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zeroed(conv(outputs, outputs, 3, padding=1))
        self.shortcut = nn.Identity() if inputs == outputs else conv(inputs, outputs, 1)
        self.attention = nn.Identity() if heads is None else _SelfAttention(outputs, heads)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.scale_shift(embedding)[(..., *(None,) * (h.ndim - 2))].chunk(2, dim=1)
        branch: Tensor = self.conv1(silu(self.norm1(h)))
        branch = silu(self.norm2(branch) * (1 + scale) + shift)
        branch = self.conv2(self.dropout(branch))
        output: Tensor = self.attention(self.shortcut(h) + branch)
        return output


class _SelfAttention(nn.Module):
    """Residual multi-head self-attention over the pixels of each image, zero at first."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = _zeroed(nn.Linear(channels, channels))

    def forward(self, h: Tensor) -> Tensor:
        tokens = self.norm(h).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return h + self.out(mixed).transpose(1, 2).unflatten(2, h.shape[2:])


def _with_presence(values: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A condition of that shape, and in one channel more 1; zeros for a row that has none."""
    if values is None:
        return like.new_zeros(shape[0], shape[1] + 1, *shape[2:])
    # NaN only: an infinite number is a mistake, and no image without its condition is to hide it
    known = ~values.flatten(1).isnan().any(1).reshape(-1, *(1,) * (len(shape) - 1))
    # where, not a product: NaN times 0 is NaN, in the gradient, too
    values = torch.where(known, values, 0).to(like.dtype)
    return torch.cat((values, known.to(like.dtype).expand(-1, 1, *shape[2:])), dim=1)


def _group_norm(channels: int) -> nn.GroupNorm:
    """Up to 8 groups, as many as divide the channels, and at least 2 channels in each where there are 2."""
    groups = max(g for g in range(1, 9) if channels % g == 0 and (g == 1 or channels // g >= 2))
    return nn.GroupNorm(groups, channels)


def _zeroed(layer: M) -> M:
    """The layer with all its parameters at zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
