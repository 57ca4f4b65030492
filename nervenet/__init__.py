"""nervenet: a U-Net from scratch, on NumPy and CuPy, for finding nerves in ultrasound images."""

from .augment import Augmentation
from .checkpoint import CheckpointError, load, load_checkpoint, save
from .convolution import use_plain as plain
from .data import DataError
from .layers import BatchNorm2D, Concat, Conv2D, ConvTranspose2D, Dropout, Layer, MaxPool2D, ReLU, Sigmoid
from .losses import BCEWithLogitsLoss, DiceLoss, WeightedSum
from .metrics import Baselines, SegmentationScores
from .optim import SGD, Adam, AdamW, ConstantSchedule, CosineSchedule, clip_gradients
from .train import predict, train_step
from .unet import DoubleConv, Down, UNet, Up

__version__ = '0.1.0'
