"""Measures interleaved times and peak memory, and counts memory on tensors without values."""

from typing import TYPE_CHECKING

from ..facade import lazy

if TYPE_CHECKING:
    from .memory import free_memory as free_memory
    from .memory import is_out_of_memory as is_out_of_memory
    from .memory import living_bytes as living_bytes
    from .memory import peak_memory as peak_memory
    from .starvation import CpuShare as CpuShare
    from .starvation import StarvationNotice as StarvationNotice
    from .timing import Ratio as Ratio
    from .timing import Timing as Timing
    from .timing import interleaved as interleaved
    from .timing import interval as interval
    from .timing import ratio as ratio
    from .timing import samples as samples
    from .timing import summary as summary
    from .tracker import Tracker as Tracker

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "memory": "free_memory is_out_of_memory living_bytes peak_memory",
        "starvation": "CpuShare StarvationNotice",
        "timing": "Ratio Timing interleaved interval ratio samples summary",
        "tracker": "Tracker",
    },
)
