"""One script for each measured table of docs/. Megatron's warnings about kernels missing on a CPU are silenced here."""

import logging
import warnings

warnings.simplefilter("ignore")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
