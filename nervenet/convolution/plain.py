"""The convolution, as mathematics.

A convolution slides a kernel of KH × KW taps over an image. Tap (i, j) multiplies the pixel that lies i rows below and j
columns right of the window's corner:

    y[n, r, c, :] = Σ_ij  x[n, r·stride + i − padding, c·stride + j − padding, :] @ weight[i, j]

Read it one tap at a time. For a fixed (i, j), the pixels that the tap meets over all output positions are a shifted,
strided view of the padded image, as large as the output, so the tap's whole contribution is one matrix product:

    y += shifted(x) @ weight[i, j]

The three functions below are this line solved for each of its three letters. y is linear in x and linear in weight, so both
gradients come from the same line by the product rule of matrices, Y = X W:  dX = dY Wᵀ,  dW = Xᵀ dY.

Shapes: x (N, H, W, C_in), weight (KH, KW, C_in, C_out), y (N, H_out, W_out, C_out); `stride` and `padding` are pairs
(vertical, horizontal) of pixels, the same on both sides.
"""

from ..engine.backend import get_array_module


def output_size(input_size, kernel_size, stride, padding):
    """Return (H_out, W_out): how many windows fit into the padded image. Raises ValueError if none does."""
    size = tuple((length + 2 * p - k) // s + 1
                 for length, k, s, p in zip(input_size, kernel_size, stride, padding))
    if min(size) < 1:
        raise ValueError(f'an input of {input_size[0]}×{input_size[1]} with padding {padding} is smaller than the '
                         f'kernel {kernel_size[0]}×{kernel_size[1]}; enlarge the input or the padding')
    return size


def pad(x, padding):
    """Return x (N, H, W, C) with `padding` rows of zeros above and below and columns of zeros left and right."""
    (PH, PW), (N, H, W, C) = padding, x.shape
    padded = get_array_module(x).zeros((N, H + 2 * PH, W + 2 * PW, C), x.dtype)
    padded[:, PH:PH + H, PW:PW + W] = x
    return padded


def taps(kernel_size, stride, output_size):
    """Yield (i, j, rows, columns) for every tap: `padded[:, rows, columns]` are the pixels that tap (i, j) meets."""
    (KH, KW), (SH, SW), (H_out, W_out) = kernel_size, stride, output_size
    for i in range(KH):
        for j in range(KW):
            yield i, j, slice(i, i + SH * (H_out - 1) + 1, SH), slice(j, j + SW * (W_out - 1) + 1, SW)


def forward(x, weight, stride, padding):
    """Return y (N, H_out, W_out, C_out), the convolution of x (N, H, W, C_in) with weight (KH, KW, C_in, C_out)."""
    KH, KW, C_in, C_out = weight.shape
    size = output_size(x.shape[1:3], (KH, KW), stride, padding)
    xp = get_array_module(x)
    padded = pad(x, padding)                                                 # (N, H + 2PH, W + 2PW, C_in)
    y = xp.zeros((len(x), *size, C_out), xp.result_type(x, weight))          # (N, H_out, W_out, C_out)
    for i, j, rows, columns in taps((KH, KW), stride, size):
        y += padded[:, rows, columns] @ weight[i, j]                         # (…, C_in) @ (C_in, C_out)
    return y


def input_gradient(dy, weight, input_size, stride, padding):
    """Return dx (N, H, W, C_in) from dy (N, H_out, W_out, C_out): every tap gives back to the pixels it met.

    `input_size` is (H, W) of x: with a stride, several input sizes give the same output size.
    """
    KH, KW, C_in, C_out = weight.shape
    (PH, PW), (H, W) = padding, input_size
    size = output_size(input_size, (KH, KW), stride, padding)
    dpadded = get_array_module(dy).zeros((len(dy), H + 2 * PH, W + 2 * PW, C_in), dy.dtype)
    for i, j, rows, columns in taps((KH, KW), stride, size):
        dpadded[:, rows, columns] += dy @ weight[i, j].T                     # (…, C_out) @ (C_out, C_in)
    return dpadded[:, PH:PH + H, PW:PW + W]                                  # the zeros around the image get no gradient


def weight_gradient(x, dy, kernel_size, stride, padding):
    """Return dweight (KH, KW, C_in, C_out): for every tap, the pixels it met times the gradient of what it made of them."""
    C_in, C_out = x.shape[3], dy.shape[3]
    padded = pad(x, padding)                                                 # (N, H + 2PH, W + 2PW, C_in)
    dweight = get_array_module(x).empty((*kernel_size, C_in, C_out), x.dtype)
    for i, j, rows, columns in taps(kernel_size, stride, dy.shape[1:3]):
        met = padded[:, rows, columns].reshape(-1, C_in)                     # (N·H_out·W_out, C_in)
        dweight[i, j] = met.T @ dy.reshape(-1, C_out)                        # (C_in, N·H_out·W_out) @ (…, C_out)
    return dweight
