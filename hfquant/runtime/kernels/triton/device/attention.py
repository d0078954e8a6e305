"""One query over a compressed KV cache, read packed: `runtime.kv_cache.CompressedLayer`'s own tensors.

A key is scale[g, d] · code + low[g, d], with one scale for `group` tokens in each channel d: so the query is multiplied
by it, once for all of them.  A value is scale[t, c] · code + low[t, c], with one scale for some channels of a token: so
the token's weight is.  No key and no value is decoded: what tensor cores multiply is the codes, made into 16-bit floats
by a shift and a logical operation (see `fields`).

Programs share the tokens; `merge` adds what they found up by its log-sum-exps, and the newest tokens, which are not
packed.
"""

import triton
import triton.language as tl

from .fields import INTERPRETED


@triton.constexpr_function
def placed(bits, j):
    """Field j of an int16 word -> (right shift, mask, magic, base) for a float16."""
    together = (10 - bits) // bits + 1
    right = j // together * together * bits
    place = j * bits - right
    return right, (2**bits - 1) << place, (25 - place) << 10, 2.0 ** (10 - place)


@triton.constexpr_function
def text_of(how):
    take = f"lop3.b32 $0, {'t' if how[0] else '$1'}, 0x{how[1]:04x}{how[1]:04x}, 0x{how[2]:04x}{how[2]:04x}, 0xea;"
    return f"{{ .reg .b32 t; shr.u32 t, $1, {how[0]}; {take} }}" if how[0] else take


@triton.jit
def code(words, BITS: tl.constexpr, J: tl.constexpr, ASM: tl.constexpr):
    """Field J of int16 words, as float16."""
    HOW: tl.constexpr = placed(BITS, J)
    if ASM:
        text: tl.constexpr = text_of(HOW)
        value = tl.inline_asm_elementwise(text, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        value = (((words >> HOW[0]) & HOW[1]) | HOW[2]).to(tl.int16).to(tl.float16, bitcast=True)
    return value - HOW[3]


@triton.jit
def codes_from(words, BITS: tl.constexpr, J: tl.constexpr, EVERY: tl.constexpr, ASM: tl.constexpr):
    """Every so many fields from J on, side by side in dimensions of 2."""
    if EVERY * BITS == 16:
        return code(words, BITS, J, ASM)
    else:
        even = codes_from(words, BITS, J, 2 * EVERY, ASM)
        return tl.join(even, codes_from(words, BITS, J + EVERY, 2 * EVERY, ASM))


@triton.jit
def codes(words, BITS: tl.constexpr, ASM: tl.constexpr):
    """int16 words of a stream [rows, n] -> its codes, float16 [rows, n · 16/BITS]"""
    return tl.reshape(codes_from(words, BITS, 0, 1, ASM), (words.shape[0], words.shape[1] * (16 // BITS)))


@triton.jit
def load_rows(at, inside, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH] at pointers [rows]; zeros beyond COUNT and where a row is not `inside`."""
    k = tl.arange(0, WIDTH)
    if COUNT == WIDTH:
        return tl.load(at[:, None] + k[None, :], mask=inside[:, None], other=0)
    else:
        return tl.load(at[:, None] + k[None, :], mask=inside[:, None] & (k < COUNT)[None, :], other=0)


@triton.jit
def dot(a, b, acc):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        return tl.dot(a, b, acc)


@triton.jit
def visible_at(mask_ptr, batch, t, tokens, total):
    """Which tokens may be looked at: those before `tokens` that the mask [batch, total] does not hide."""
    inside = t < tokens
    if mask_ptr is not None:
        inside = inside & (tl.load(mask_ptr + batch * total + t, mask=inside, other=0) != 0)
    return inside


@triton.jit
def weighed(scores, m, l):
    """A step of the softmax: weights of new scores [ROWS, TOKENS], the new maximum and sum, what the old shrink by."""
    newest = tl.maximum(m, tl.max(scores, 1))
    least = tl.maximum(newest, -1e30)  # where all is hidden so far: exp2(−inf − −1e30) is 0, and not NaN
    p = tl.exp2(scores - least[:, None])
    shrink = tl.exp2(m - least)
    return p, newest, l * shrink + tl.sum(p, 1), shrink


@triton.jit(do_not_specialize=["heads", "tokens", "total"])
def packed(
    q_ptr,
    key_ptr,
    key_scale_ptr,
    key_low_ptr,
    value_ptr,
    value_scale_ptr,
    value_low_ptr,
    mask_ptr,
    o_ptr,
    m_ptr,
    l_ptr,
    heads,
    tokens,
    total,
    scale,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
    VALUE_WORDS: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    ASM: tl.constexpr,
):
    """QUERIES heads of q [·, QUERIES, SIZE] share the keys and values of one; -> o [·, SPLIT, ROWS, VALUE_SIZE], m, l.

    WORDS: int16 words of a key, VALUE_WORDS: of CHANNELS of a value, both made up to powers of two.
    """
    PARTS: tl.constexpr = VALUE_SIZE // CHANNELS
    WIDTH: tl.constexpr = WORDS * (16 // BITS)
    head, share = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch = head // heads
    r = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    query = load_rows(q_ptr + (head * QUERIES + r) * SIZE, r < QUERIES, SIZE, WIDTH).to(tl.float32) * scale
    acc = ()
    for _ in tl.static_range(PARTS):
        acc = acc + (tl.zeros((ROWS, VALUE_WORDS * (16 // BITS)), tl.float32),)
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    part = tl.cdiv(tl.cdiv(tokens, SPLIT), TOKENS) * TOKENS
    for first in range(share * part, tl.minimum((share + 1) * part, tokens), TOKENS):
        t = first + tl.arange(0, TOKENS)
        inside = t < tokens
        row = head * tokens + t
        at = (head * tl.cdiv(tokens, GROUP) + first // GROUP) * SIZE + d
        key_scale = tl.load(key_scale_ptr + at, mask=d < SIZE, other=0.0).to(tl.float32)
        key_low = tl.load(key_low_ptr + at, mask=d < SIZE, other=0.0).to(tl.float32)
        key = codes(load_rows(key_ptr + row * KEY_STRIDE, inside, SIZE * BITS // 16, WORDS), BITS, ASM)
        constant = tl.sum(query * key_low[None, :], 1)
        scores = tl.broadcast_to(constant[:, None], (ROWS, TOKENS))
        scores = dot((query * key_scale[None, :]).to(tl.float16), tl.trans(key), scores)
        visible = visible_at(mask_ptr, batch, t, tokens, total)
        p, m, l, shrink = weighed(tl.where(visible[None, :], scores, float("-inf")), m, l)
        found = ()
        for c in tl.static_range(PARTS):
            value_scale = tl.load(value_scale_ptr + row * PARTS + c, mask=inside, other=0.0).to(tl.float32)
            value_low = tl.load(value_low_ptr + row * PARTS + c, mask=inside, other=0.0).to(tl.float32)
            at_value = value_ptr + row * VALUE_STRIDE + c * CHANNELS * BITS // 16
            value = codes(load_rows(at_value, inside, CHANNELS * BITS // 16, VALUE_WORDS), BITS, ASM)
            before = acc[c] * shrink[:, None] + tl.sum(p * value_low[None, :], 1)[:, None]
            found = found + (dot((p * value_scale[None, :]).to(tl.float16), value, before),)
        acc = found
    at_row = (head * SPLIT + share) * ROWS + r
    e = tl.arange(0, VALUE_WORDS * (16 // BITS))
    for c in tl.static_range(PARTS):
        at_o = o_ptr + at_row[:, None] * VALUE_SIZE + (c * CHANNELS + e)[None, :]
        tl.store(at_o, acc[c], mask=(r < QUERIES)[:, None] & (e < CHANNELS)[None, :])
    tl.store(m_ptr + at_row, m)
    tl.store(l_ptr + at_row, l)


@triton.jit(do_not_specialize=["heads", "past", "recent", "total"])
def merge(
    q_ptr,
    key_ptr,
    value_ptr,
    mask_ptr,
    o_ptr,
    m_ptr,
    l_ptr,
    y_ptr,
    heads,
    past,
    recent,
    total,
    scale,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """What the shares found, and the newest tokens: keys [·, recent, SIZE], values -> y [·, QUERIES, VALUE_SIZE]."""
    head = tl.program_id(0).to(tl.int64)
    batch = head // heads
    r = tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    e = tl.arange(0, VALUE_WIDTH)
    query = tl.load(
        q_ptr + (head * QUERIES + r)[:, None] * SIZE + d[None, :],
        mask=(r < QUERIES)[:, None] & (d < SIZE)[None, :],
        other=0.0,
    )
    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
    there = (r < QUERIES)[:, None] & (e < VALUE_SIZE)[None, :]
    for share in range(SPLIT):
        row = (head * SPLIT + share) * ROWS + r
        greatest = tl.load(m_ptr + row)
        newest = tl.maximum(m, greatest)
        least = tl.maximum(newest, -1e30)
        shrink, grow = tl.exp2(m - least), tl.exp2(greatest - least)
        l = l * shrink + tl.load(l_ptr + row) * grow
        o = tl.load(o_ptr + row[:, None] * VALUE_SIZE + e[None, :], mask=there, other=0.0)
        acc = acc * shrink[:, None] + o * grow[:, None]
        m = newest
    for first in range(0, recent, TOKENS):
        t = first + tl.arange(0, TOKENS)
        visible = visible_at(mask_ptr, batch, past + t, past + recent, total)
        row = head * recent + t
        key = tl.load(
            key_ptr + row[None, :] * SIZE + d[:, None], mask=(t < recent)[None, :] & (d < SIZE)[:, None], other=0.0
        )
        scores = dot(query, key, tl.zeros((ROWS, TOKENS), tl.float32)) * scale
        p, m, l, shrink = weighed(tl.where(visible[None, :], scores, float("-inf")), m, l)
        value = tl.load(
            value_ptr + row[:, None] * VALUE_SIZE + e[None, :],
            mask=(t < recent)[:, None] & (e < VALUE_SIZE)[None, :],
            other=0.0,
        )
        acc = dot(p.to(value.dtype), value, acc * shrink[:, None])
    y = acc / tl.where(l > 0, l, 1.0)[:, None]
    tl.store(y_ptr + (head * QUERIES + r)[:, None] * VALUE_SIZE + e[None, :], y.to(y_ptr.dtype.element_ty), mask=there)
