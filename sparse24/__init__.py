"""sparse24: transformers pre-train with 2:4 sparse feed-forward layers, through torch.compile(model,
backend="sparse24").
"""

from .compiler.backend import sparse24 as backend
from .compiler.errors import NotFiniteError, OptionError, RankError, SkippedError, StateError
from .compiler.explain import explain
from .compiler.export import prune, save_safetensors
from .compiler.find_decay import DecaySearch, NoFeasibleDecay, find_decay
from .compiler.onnx import export_onnx
from .compiler.recipe import Recipe
from .compiler.report import Report
from .compiler.semi_structured import to_semi_structured
from .compiler.session import Session, session
from .compiler.tensorrt import export_tensorrt, trtexec
from .compiler.verify import Verification, verify
from .compiler.weights import SparseWeight

__version__ = "0.1.0"
__all__ = [
    "DecaySearch",
    "NoFeasibleDecay",
    "NotFiniteError",
    "OptionError",
    "RankError",
    "Recipe",
    "Report",
    "Session",
    "SkippedError",
    "SparseWeight",
    "StateError",
    "Verification",
    "backend",
    "explain",
    "export_onnx",
    "export_tensorrt",
    "find_decay",
    "prune",
    "save_safetensors",
    "session",
    "to_semi_structured",
    "trtexec",
    "verify",
]
