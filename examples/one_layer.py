"""One layer by hand: a convolution and its gradients, number by number, and then the library's layer, which gives the same.

    python examples/one_layer.py

Everything in this library is this page, repeated with more channels.
"""

import numpy

import nervenet

x = numpy.array([[1.0, 2, 0, 1],            # an image of 3 × 4 pixels, one channel
                 [0, 1, 3, 1],
                 [2, 0, 1, 2]])
weight = numpy.array([[1.0, -1],            # a kernel of 2 × 2 taps
                      [0, 2]])
bias = 0.5


def show(name, array):
    """Print a small matrix beside its name."""
    for number, row in enumerate(array):
        print(f'{name + " = " if number == 0 else "":>12}' + ' '.join(f'{value:6.2f}' for value in row))
    print()


print('1. Forward. The kernel lies on 2 × 3 places of the image. At each, multiply what lies upon each other, and add.\n')
show('x', x)
show('weight', weight)
y = numpy.zeros((2, 3))
for r in range(2):
    for c in range(3):
        window = x[r:r + 2, c:c + 2]
        y[r, c] = (window * weight).sum() + bias
        terms = ' + '.join(f'{pixel:g}·{tap:g}' for pixel, tap in zip(window.ravel(), weight.ravel()))
        print(f'   y[{r},{c}] = {terms} + {bias} = {y[r, c]:g}')
print()

print('2. A loss. Training wants one number to be small. Take the mean squared distance from a wish t.\n')
t = numpy.array([[3.0, 6, 2], [0, 1, 4]])
loss = ((y - t)**2).mean()
show('t', t)
print(f'   loss = mean (y − t)² = {loss:.4f}\n')

print('3. Backward begins at the loss: how does it change with each y? By 2·(y − t) / 6. Call that dy.\n')
dy = 2 * (y - t) / y.size
show('dy', dy)

print('4. How does the loss change with each tap? A tap moved every y, each as much as the pixel it met there.\n')
dweight = numpy.zeros((2, 2))
for i in range(2):
    for j in range(2):
        met = x[i:i + 2, j:j + 3]           # the pixels that tap (i, j) met, one for each y
        dweight[i, j] = (met * dy).sum()
dbias = dy.sum()                            # the bias entered every y with factor 1
show('dweight', dweight)
print(f'{"dbias = ":>12}{dbias:6.2f}\n')

print('5. How does it change with each pixel? A pixel moved every y whose window held it, each as much as the tap upon it.\n')
dx = numpy.zeros((3, 4))
for r in range(2):
    for c in range(3):
        dx[r:r + 2, c:c + 2] += dy[r, c] * weight
show('dx', dx)

print('6. Is it true? Move one tap a little and watch the loss: the definition of a derivative.\n')
h = 1e-6
moved = weight.copy()
moved[0, 1] += h
y_moved = sum(x[i:i + 2, j:j + 3] * moved[i, j] for i in range(2) for j in range(2)) + bias
measured = (((y_moved - t)**2).mean() - loss) / h
print(f'   (loss(weight[0,1] + {h:g}) − loss) / {h:g} = {measured:.5f},  dweight[0,1] = {dweight[0, 1]:.5f}\n')

print('7. One step against the gradient makes the loss smaller.\n')
rate = 0.05
y_after = sum(x[i:i + 2, j:j + 3] * (weight - rate * dweight)[i, j] for i in range(2) for j in range(2)) + bias - rate * dbias
print(f'   loss {loss:.4f} → {((y_after - t)**2).mean():.4f}\n')

print('8. The library: the same layer, with axes for images and channels, (N, H, W, C).\n')
layer = nervenet.Conv2D(1, 1, kernel_size=2, padding=0, dtype=float)
layer.params['weight'][:, :, 0, 0] = weight
layer.params['bias'][0] = bias
library_y = layer.forward(x[None, :, :, None])
library_dx = layer.backward(dy[None, :, :, None])
for name, by_hand, by_library in (('y', y, library_y[0, :, :, 0]), ('dx', dx, library_dx[0, :, :, 0]),
                                  ('dweight', dweight, layer.grads['weight'][:, :, 0, 0]), ('dbias', dbias, layer.grads['bias'][0])):
    difference = numpy.abs(by_hand - by_library).max()
    print(f'   {name:8} largest difference from the library: {difference:.1e}')
    if not difference < 1e-12:
        raise SystemExit(f'one_layer.py: {name} by hand and by the library differ')
