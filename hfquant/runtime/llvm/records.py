"""What Python tells the generated code: records of 64-bit integers, named place by place."""

from enum import IntEnum

import torch

ROWS = 16  # of a weight in a tile
BLOCK = 32  # columns in a block
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Weight(IntEnum):
    """A weight in tiles; what does not change between calls."""

    TILE = 0  # address of the function that computes a tile
    CODES = 1  # [tiles, runs, blocks, bits, 64]
    SCALES = 2  # [tiles, scales, 16] of the type it was compiled for
    ZEROS = 3  # uint8 [tiles, scales, 16]
    SUMS = 4  # int32 [tiles, runs, 16]: sums of a run's codes
    OUT = 5  # rows of the weight
    BLOCKS = 6  # in a run
    SCALES_COUNT = 7
    PER_SCALE = 8  # runs that share a scale
    RANK = 9
    FACTORS = 10  # U, int8 [tiles, rank, 16]


class Call(IntEnum):
    """One x and one weight."""

    X = 0
    KIND = 1  # of x and y
    COUNT = 2  # rows of x
    INPUTS = 3  # address of the record of how x is prepared
    PREPARED = 4  # int8 or float32 [rows, runs·columns of a run]
    SCALES = 5  # float32 [rows, runs]; in real products the sums of x
    NEGATIVE = 6  # int32 [rows, runs]: −Σ (q − y)
    SHIFTS = 7  # int32 [rows, runs]: −y
    SCRATCH = 8  # float32 [threads, runs·columns]
    WEIGHT = 9  # address of its record
    Y = 10
    BIAS = 11  # 0: none
    BIAS_KIND = 12
    INNER = 13  # (x Vᵀ)·s, float32 [rows, rank]
    TILES = 14
    STEP = 15  # tiles that a thread takes at a time
    BAND = 16  # rows of x that are multiplied before the next ones
    NEXT = 17  # the next tile to take; starts at 0
    THREAD = 18  # addresses of OpenMP's functions; 0: one thread
    THREADS = 19
    BARRIER = 20


class Inputs(IntEnum):
    """How x is prepared; what does not change between calls."""

    COLUMNS = 0  # of x
    RUNS = 1
    LENGTH = 2  # padded columns of a run
    TABLE = 3  # int64 [runs, 2]: first column and columns of every run
    GROUPS = 4  # of runs that share a scale of x
    FIRST = 5  # int64 [groups + 1]: first run of every group
    DIVISORS = 6  # float32 [columns] by which x is divided; 0: none
    STATIC = 7  # address of a stored scale; 0: found for every row
    STATIC_ZERO = 8
    SHIFTED = 9  # whether x has a zero point
    BOTTOM = 10  # smallest and largest code
    TOP = 11
