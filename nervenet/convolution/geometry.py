"""Where a kernel's taps fall on an image: kernel size, stride, padding and dilation, and what follows from them."""

from dataclasses import dataclass
from functools import cached_property

from ..checks import pair
from ..engine.memory import empty


@dataclass(frozen=True)
class Geometry:
    """The geometry of a convolution: each of the four is a pair (vertical, horizontal) of pixels, or one number for both.

        kernel_size   KH × KW taps
        stride        from one window to the next
        padding       zeros around the image, as many on both sides; 'same' keeps the size at stride 1, and takes odd kernels only
        dilation      from one tap to the next: 1 where they are neighbours (Yu & Koltun 2016, arXiv:1511.07122)

    Raises ValueError for what is not a whole number in its range, and for 'same' with an even kernel.
    """

    kernel_size: tuple
    stride: tuple = 1
    padding: tuple = 0
    dilation: tuple = 1

    def __post_init__(self):
        for name in 'kernel_size', 'stride', 'dilation':
            object.__setattr__(self, name, pair(getattr(self, name), name))
        padding = self.padding
        if isinstance(padding, str):
            KH, KW = self.kernel_size
            if padding != 'same':
                raise ValueError(f"padding is {padding!r}; expected 'same', a number of pixels or a pair of them")
            if KH % 2 == 0 or KW % 2 == 0:
                raise ValueError(f"padding='same' needs an odd kernel, got {KH}×{KW}; give the padding in pixels instead")
            padding = tuple(length // 2 for length in self.extent)
        object.__setattr__(self, 'padding', pair(padding, 'padding', least=0))

    @cached_property
    def extent(self):
        """How many rows and columns a window spans, from its first tap to its last."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel_size, self.dilation))

    def output_size(self, input_size):
        """Return (H_out, W_out): how many windows fit into the padded image. Raises ValueError if none does."""
        size = tuple((length + 2 * p - e) // s + 1
                     for length, p, e, s in zip(input_size, self.padding, self.extent, self.stride))
        if min(size) < 1:
            raise ValueError(f'an input of {input_size[0]}×{input_size[1]} with padding {self.padding} is smaller than the '
                             f'kernel, which spans {self.extent[0]}×{self.extent[1]}; enlarge the input or the padding')
        return size

    def taps(self, output_size):
        """Yield (i, j, rows, columns) for every tap: `padded[:, rows, columns]` are the pixels that tap (i, j) meets.

        They are as many as there are windows: tap (i, j) lies i·dilation rows below the corner of each.
        """
        (KH, KW), (SH, SW), (DH, DW), (H_out, W_out) = self.kernel_size, self.stride, self.dilation, output_size
        for i in range(KH):
            for j in range(KW):
                yield (i, j, slice(i * DH, i * DH + SH * (H_out - 1) + 1, SH),
                       slice(j * DW, j * DW + SW * (W_out - 1) + 1, SW))

    def input_range(self, first, last, axis):
        """Return the first and the last input position, along axis 0 or 1, that the outputs from `first` to `last` depend on."""
        start = first * self.stride[axis] - self.padding[axis]
        return start, start + (last - first) * self.stride[axis] + self.extent[axis] - 1

    def turned(self):
        """Return the geometry of the convolution that the input gradient is, or None if it is none.

        At stride 1, pixel (r, c) was met by tap (i, j) of the output (r − i·dilation, c − j·dilation) + padding. So it collects dy
        through the kernel turned by 180° (`turn`), with padding extent − 1 − p. A stride would leave holes, and a padding wider than
        the kernel would have to become negative.
        """
        padding = tuple(e - 1 - p for e, p in zip(self.extent, self.padding))
        return Geometry(self.kernel_size, 1, padding, self.dilation) if self.stride == (1, 1) and min(padding) >= 0 else None


def turn(weight):
    """Return weight (KH, KW, C_in, C_out) turned by 180°, its channels exchanged: (KH, KW, C_out, C_in)."""
    KH, KW, C_in, C_out = weight.shape
    turned = empty((KH, KW, C_out, C_in), weight)
    turned[...] = weight[::-1, ::-1].swapaxes(2, 3)
    return turned
