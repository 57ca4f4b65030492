"""nervenet: U-Nets from scratch, on NumPy and CuPy, for finding nerves in ultrasound images."""

from .engine.paths import plain
from .images.augment import Augmentation
from .images.samples import DataError
from .layers import Add, BatchNorm2D, Concat, Conv2D, ConvTranspose2D, Dropout, Layer, LeakyReLU, MaxPool2D, ReLU, Sigmoid
from .losses import BCEWithLogitsLoss, DiceLoss, WeightedSum
from .metrics import Baselines, SegmentationScores
from .networks.blocks import DoubleConv, Down, Up
from .networks.optimised_resunet import OptimisedResUNet
from .networks.refinenet import RefineNet
from .networks.resnet import ResNetUNet
from .networks.resunet import ResUNet
from .networks.unet import UNet
from .optim import SGD, Adam, AdamW, ConstantSchedule, CosineSchedule, clip_gradients
from .resampling import Upsample2D
from .study.checkpoint import CheckpointError, load, load_checkpoint, save
from .train import predict, train_step

__version__ = '0.1.0'
