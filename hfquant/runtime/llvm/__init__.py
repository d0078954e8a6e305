"""Low-bit products on x86 CPUs in code that `hfquant.llvm` makes when a width is first needed.

    codes     bit planes -> codes in vector registers
    integer   a tile of integer products: x in int8
    real      a tile of products with x as it is
    finish    the end of both: low rank, bias, type
    inputs    what x becomes first
    driver    one call: x prepared, tiles shared out over torch's own threads
    packing   codes -> the tiles' layout
    unpacking packed words -> codes, codes -> a dense weight; `fast` puts it in torch's place
    compiled  the code of all that, compiled when it is asked for
    joining   the tiles of several weights as those of one
    layout    a weight in tiles; `records`: what the code is told; `call`: a layer
    memory    large pages

**Tiles.**  16 rows of W and 32 columns are a block: `bits` lines of 64 bytes, plane after plane (5 = 4 + 1), 4-byte
lane r of a line belonging to row r.  A plane of width w holds 8/w chunks of 4 columns in every line, in the bit
fields of its bytes; all widths see the same columns in chunk c, lane byte k: `codes.column`.  So a line is unpacked
with a shift and a mask, multiplied by 4 columns of x at once, and a weight that was stored in planes of 2, 4 or 8
bits in 32-bit words needs only a transposition of those words to get there.

**Runs** are columns that share a scale of the weight and one of x; each is padded to whole blocks.  Within a run all is
integer and exact.
"""
