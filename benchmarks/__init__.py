"""One script for each measured table of docs/; what Megatron says of kernels that a CPU does not have is left out."""

import logging
import warnings

warnings.simplefilter("ignore")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
