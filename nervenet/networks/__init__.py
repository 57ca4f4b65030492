"""Networks, and what can be said of any of them.

To add one: a file beside `unet.py`, and a line in NETWORKS.
"""

from .unet import UNet

NETWORKS = {'unet': UNet}               # its name on the command line → its class: what training can build and a model file can hold
