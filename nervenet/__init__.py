"""nervenet: a U-Net from scratch, on NumPy and CuPy, for finding nerves in ultrasound images."""

from .convolution import use_plain as plain
from .images.augment import Augmentation
from .images.data import DataError
from .layers import BatchNorm2D, Concat, Conv2D, ConvTranspose2D, Dropout, Layer, MaxPool2D, ReLU, Sigmoid
from .losses import BCEWithLogitsLoss, DiceLoss, WeightedSum
from .metrics import Baselines, SegmentationScores
from .networks.unet import DoubleConv, Down, UNet, Up
from .optim import SGD, Adam, AdamW, ConstantSchedule, CosineSchedule, clip_gradients
from .study.checkpoint import CheckpointError, load, load_checkpoint, save
from .train import predict, train_step

__version__ = '0.1.0'
