from collections.abc import Mapping
from typing import final

import numpy as np
import numpy.typing as npt

@final
class NearestCodes:
    def __init__(self, codebooks: npt.NDArray[np.float32]) -> None: ...
    def __call__(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]: ...

def shortened(
    bytes: npt.NDArray[np.uint8],
    splits: npt.NDArray[np.int64],
    seeds: npt.NDArray[np.uint64],
    *,
    drop_rate: float,
    typo_rate: float,
) -> list[bytes]: ...

@final
class TitlePieces:
    def __init__(self, keep_rates: Mapping[str, float]) -> None: ...
    def __call__(
        self,
        bytes: npt.NDArray[np.uint8],
        splits: npt.NDArray[np.int64],
        seeds: npt.NDArray[np.uint64],
        *,
        typo_rate: float,
    ) -> tuple[list[bytes], list[bytes]]: ...
