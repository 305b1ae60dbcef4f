"""Functions on tensors and settings, asked with whatever Hypothesis thinks of: a sound answer, or an error of cg3d."""
import contextlib
import json
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays, from_dtype

from cg3d.config import TrainConfig
from cg3d.errors import Cg3dError
from cg3d.files import lzf_decompress, unit_colours
from cg3d.losses import POSITIVES, TriModalLoss
