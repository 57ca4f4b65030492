"""The convolution, as mathematics.

A convolution slides a kernel of KH × KW taps over an image. Tap (i, j) multiplies the pixel that lies i·dilation rows below and
j·dilation columns right of the window's corner:

    y[n, r, c, :] = bias + Σ_ij  x[n, r·stride + i·dilation − padding, c·stride + j·dilation − padding, :] @ weight[i, j]

Read it one tap at a time. For a fixed (i, j), the pixels that the tap meets over all output positions are a shifted,
strided view of the padded image, as large as the output, so the tap's whole contribution is one matrix product:

    y += shifted(x) @ weight[i, j]

The three functions below are this line solved for each of its three letters. y is linear in x and linear in weight, so both
gradients come from the same line by the product rule of matrices, Y = X W:  dX = dY Wᵀ,  dW = Xᵀ dY.

Shapes: x (N, H, W, C_in), weight (KH, KW, C_in, C_out), y (N, H_out, W_out, C_out). A `Geometry` holds kernel size, stride,
padding and dilation; its `taps` are the shifted, strided views.
"""

from ..engine.backend import get_array_module


def pad(x, padding):
    """Return x (N, H, W, C) with `padding` rows of zeros above and below and columns of zeros left and right."""
    (PH, PW), (N, H, W, C) = padding, x.shape
    padded = get_array_module(x).zeros((N, H + 2 * PH, W + 2 * PW, C), x.dtype)
    padded[:, PH:PH + H, PW:PW + W] = x
    return padded


def forward(x, weight, geometry, bias=None):
    """Return y (N, H_out, W_out, C_out), the convolution of x (N, H, W, C_in) with weight (KH, KW, C_in, C_out), plus bias (C_out,)."""
    size, C_out = geometry.output_size(x.shape[1:3]), weight.shape[3]
    xp = get_array_module(x)
    padded = pad(x, geometry.padding)                                        # (N, H + 2PH, W + 2PW, C_in)
    y = xp.zeros((len(x), *size, C_out), xp.result_type(x, weight))          # (N, H_out, W_out, C_out)
    for i, j, rows, columns in geometry.taps(size):
        y += padded[:, rows, columns] @ weight[i, j]                         # (…, C_in) @ (C_in, C_out)
    return y if bias is None else y + bias


def input_gradient(dy, weight, input_size, geometry, bias=None):
    """Return dx (N, H, W, C_in) from dy (N, H_out, W_out, C_out): every tap gives back to the pixels it met.

    `input_size` is (H, W) of x: with a stride, several input sizes give the same output size. This is also the forward of a
    transposed convolution, and then `bias` (C_in,) is added to every pixel.
    """
    (PH, PW), (H, W), C_in = geometry.padding, input_size, weight.shape[2]
    size = geometry.output_size(input_size)
    dpadded = get_array_module(dy).zeros((len(dy), H + 2 * PH, W + 2 * PW, C_in), dy.dtype)
    for i, j, rows, columns in geometry.taps(size):
        dpadded[:, rows, columns] += dy @ weight[i, j].T                     # (…, C_out) @ (C_out, C_in)
    dx = dpadded[:, PH:PH + H, PW:PW + W]                                    # the zeros around the image get no gradient
    return dx if bias is None else dx + bias


def weight_gradient(x, dy, geometry):
    """Return dweight (KH, KW, C_in, C_out): for every tap, the pixels it met times the gradient of what it made of them."""
    C_in, C_out = x.shape[3], dy.shape[3]
    padded = pad(x, geometry.padding)                                        # (N, H + 2PH, W + 2PW, C_in)
    dweight = get_array_module(x).empty((*geometry.kernel_size, C_in, C_out), x.dtype)
    for i, j, rows, columns in geometry.taps(dy.shape[1:3]):
        met = padded[:, rows, columns].reshape(-1, C_in)                     # (N·H_out·W_out, C_in)
        dweight[i, j] = met.T @ dy.reshape(-1, C_out)                        # (C_in, N·H_out·W_out) @ (…, C_out)
    return dweight
