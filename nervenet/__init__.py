"""nervenet: a U-Net from scratch, on NumPy and CuPy, for finding nerves in ultrasound images."""

from .layers import BatchNorm2D, Concat, Conv2D, ConvTranspose2D, Dropout, Layer, MaxPool2D, ReLU, Sigmoid
from .unet import DoubleConv, Down, UNet, Up

__version__ = '0.1.0'
