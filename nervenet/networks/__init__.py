"""Networks, and what can be said of any of them.

To add one: a file beside `unet.py`, and a line in NETWORKS.
"""

from .optimised_resunet import OptimisedResUNet
from .refinenet import RefineNet
from .resnet import ResNetUNet
from .resunet import ResUNet
from .unet import UNet

# Its name on the command line → its class: what training can build and a model file can hold.
NETWORKS = {'unet': UNet, 'resunet': ResUNet, 'resnet': ResNetUNet, 'refinenet': RefineNet, 'optimised-resunet': OptimisedResUNet}
