"""Convolution: forward, gradient to the input and gradient to the weight, as stateless functions.

Read `plain.py`: it is the mathematics, complete.
"""

from .plain import forward, input_gradient, output_size, weight_gradient
