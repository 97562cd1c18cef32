"""Where training batches come from: a table held in memory, a store read block by block, or chunks."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from biosae.errors import InputError
from biosae.sae.rows import IN_MEMORY, Held, Rows, bits, spread
from biosae.sae.sequential import HalfFull, pieces

BLOCK_ROWS = 2048
"""Consecutive rows read at once."""
BUFFER_BLOCKS = 32
"""Blocks, drawn from the whole file, among which rows are shuffled."""
AHEAD_ROWS = 16384
"""Rows that the reading thread may be ahead of training, in at most 4 batches."""

_BLOCKS, _ROWS = 1, 2  # what a random order is of


class _Full(NamedTuple):
    """Follows the last rows of a buffer."""

    epoch: int
    number: int
    skip: int  # rows of the shuffled buffer that earlier batches have had
    last: bool  # of the epoch


class Stream:
    """Endless batches of training rows, in an order that depends on the seed and the number of the batch alone.

    A table of at most 2 GiB as float32 is loaded once, onto ``device``, and shuffled as a whole each epoch. A larger
    one is read by a thread ahead of training: blocks of ``block_rows`` consecutive rows come in random order, and
    rows are shuffled within buffers of up to ``buffer_blocks`` blocks, in which every row of a block given out makes
    room for one of a later block. Chunks pass in their own order through a buffer of the same size.
    In each epoch every training row comes once, but for those left over when batches are full.

    With ``fast_buffer`` the order is that of FAST: instances come whole, one after the other in random order (chunks in
    their own), into a buffer of that many rows; whenever it is full, a random half of it is given out, and at the end
    of the epoch what is left.

    Parameters
    ----------
    rows
        The table, or chunks.
    held
        Rows that are never given out.
    batch_size
        Rows of a batch, over all ranks.
    seed
        Of the order.
    device
        Where batches are wanted.
    block_rows, buffer_blocks
        Size of the pieces in which a table that is not held in memory is read and shuffled.
    fast_buffer
        Rows of the buffer of FAST. None: shuffled.
    instances
        For FAST: first rows of the instances, and the length of the table (:func:`biosae.sae.sequential.bounds`). Of
        chunks each one is an instance.

    Attributes
    ----------
    n : int or None
        Training rows; None for chunks.
    per_epoch : int or None
        Batches of an epoch; None for chunks.
    in_memory : bool
        Whether the table is held in memory.

    Raises
    ------
    InputError
        If there are fewer training rows than one batch, or a row holds NaN or infinity.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        held: Held | None = None,
        batch_size: int,
        seed: int,
        device: str | torch.device = "cpu",
        block_rows: int = BLOCK_ROWS,
        buffer_blocks: int = BUFFER_BLOCKS,
        fast_buffer: int | None = None,
        instances: np.ndarray | None = None,
    ) -> None:
        self.rows, self.held = rows, Held() if held is None else held
        self.batch_size, self.seed, self.device = batch_size, seed, torch.device(device)
        self.block_rows, self.buffer_blocks = block_rows, buffer_blocks
        self.fast_buffer, self.instances = fast_buffer, instances
        self.n = None if rows.n is None else rows.n - len(self.held)
        self.per_epoch = None if self.n is None else self.n // batch_size
        if self.per_epoch == 0:
            raise InputError(f"batch_size={batch_size}, but there are {self.n} training rows; choose a smaller batch")
        self.in_memory = rows.n is not None and 4 * rows.n * rows.d <= IN_MEMORY
        if self.in_memory:
            self._table = self._load()
            self._train = np.flatnonzero(~self.held.mask(0, rows.n))
        elif rows.n is not None:
            edges = np.minimum(np.arange(-(-rows.n // block_rows) + 1) * block_rows, rows.n)
            self._counts = np.diff(edges - self.held.before(edges))
            self._filled = np.flatnonzero(self._counts)  # blocks that hold training rows

    # ------------------------------------------------------------------------------------------------ batches

    def batches(self, start: int = 0, *, part: tuple[int, int] = (0, 1)) -> Iterator[torch.Tensor]:
        """Batches from number ``start`` on, without end: float32 (batch_size, d) on the device.

        They are the same bits as after taking ``start`` batches; of a table only what they need is read, chunks are
        passed through. Closing the iterator ends the reading thread.

        Parameters
        ----------
        start
            Number of the first batch.
        part
            ``(rank, world)``: of every batch only rows ``rank * s`` to ``(rank + 1) * s``, s = batch_size / world.

        Raises
        ------
        InputError
            If the ranks cannot share a batch evenly, or a row holds NaN or infinity.
        """
        rank, world = part
        share, rest = divmod(self.batch_size, world)
        if rest or not 0 <= rank < world:
            raise InputError(
                f"rank {rank} of {world} cannot have an equal share of a batch of {self.batch_size} rows; choose a "
                f"batch_size that {world} divides"
            )
        mine = (rank * share, (rank + 1) * share)
        return self._from_memory(start, mine) if self.in_memory else self._from_thread(start, mine)

    def _from_memory(self, start: int, mine: tuple[int, int]) -> Iterator[torch.Tensor]:
        epoch, first = divmod(start, self.per_epoch)
        while True:
            order = torch.from_numpy(self._order(epoch)).to(self.device)
            for batch in range(first, self.per_epoch):
                at = batch * self.batch_size
                yield self._table.index_select(0, order[at + mine[0] : at + mine[1]]).float()
            epoch, first = epoch + 1, 0

    def _order(self, epoch: int) -> np.ndarray:
        """Numbers of the training rows of a table in memory in the order of one epoch, (n,)."""
        if self.fast_buffer is None:
            return self._train[self._rng(_ROWS, epoch).permutation(self.n)]
        numbers, out = np.empty(2 * self.fast_buffer, np.int64), []
        for piece, _, places in self._sequence(epoch):
            if piece is None:
                out.append(numbers[places])
            else:
                numbers[places] = piece
        return np.concatenate(out)

    def _from_thread(self, start: int, mine: tuple[int, int]) -> Iterator[torch.Tensor]:
        ahead: queue.Queue = queue.Queue(max(1, min(4, AHEAD_ROWS // (mine[1] - mine[0]))))
        ended = threading.Event()
        source = (self._assemble if self.fast_buffer is None else self._assemble_fast)(start, mine)

        def read() -> None:
            try:
                for batch in source:
                    ahead.put(batch)
                    if ended.is_set():
                        return
            except BaseException as error:  # raised again where the batch is wanted
                ahead.put(error)
            finally:
                source.close()

        thread = threading.Thread(target=read, name="biosae-stream", daemon=True)
        thread.start()
        try:
            while True:
                batch = ahead.get()
                if isinstance(batch, BaseException):
                    raise batch
                yield batch.to(self.device, non_blocking=True).float()
        finally:
            ended.set()
            while thread.is_alive():  # make room for a batch that waits
                with contextlib.suppress(queue.Empty):
                    ahead.get_nowait()
                thread.join(0.01)

    def _assemble(self, start: int, mine: tuple[int, int]) -> Iterator[torch.Tensor]:
        """Batches out of one buffer: places of rows given out are filled with the rows of the next buffer."""
        low, high = mine
        pieces, unwanted = (self._chunk_pieces(), start) if self.n is None else (self._block_pieces(start), 0)
        capacity = self.block_rows * self.buffer_blocks
        buffer = bits(torch.empty((capacity, self.rows.d), dtype=self.rows.dtype))
        free = np.arange(capacity)  # places, in the order in which they get free
        line, at = free[:0], 0  # places of the shuffled rows in the order of batches; how many were given out
        filled = 0  # rows of the next buffer that are in already
        batch, have, last = None, 0, False
        for piece in pieces:
            full = isinstance(piece, _Full)
            needed = capacity if full else filled + len(piece)
            while capacity - (len(line) - at) < needed:
                if batch is None:
                    batch = self._empty_batch(high - low)
                count = min(self.batch_size - have, len(line) - at)
                begin, end = max(low, have), min(high, have + count)
                if begin < end and not unwanted:
                    places = line[at + begin - have : at + end - have]
                    np.take(buffer, places, axis=0, out=bits(batch)[begin - low : end - low], mode="clip")
                at, have = at + count, have + count
                if have == self.batch_size:
                    if not unwanted:
                        yield batch
                        batch = None
                    unwanted, have = max(0, unwanted - 1), 0
            if full:
                if last:
                    have = 0
                order = self._rng(_ROWS, piece.epoch, piece.number).permutation(filled)
                line, at, last = free[:filled][order], piece.skip, piece.last
                free, filled = np.concatenate([free[filled:], line]), 0
            else:
                buffer[free[filled:needed]] = bits(piece)
                filled = needed

    def _sequence(self, epoch: int) -> Iterator[tuple[Any, HalfFull, np.ndarray]]:
        """One epoch of FAST: what goes into the buffer (row numbers; of chunks the rows) or None, the buffer, places.

        None: rows come out of these places.
        """
        buffer, rng = HalfFull(self.fast_buffer), self._rng(_ROWS, epoch)
        if self.n is None:
            parts = (part for _, chunk in self.rows.pieces() for part in chunk.split(self.fast_buffer))
        else:
            spans = pieces(self.instances, self.fast_buffer, self._rng(_BLOCKS, epoch))
            parts = (start + np.flatnonzero(~self.held.mask(start, stop)) for start, stop in spans)
        for part in parts:
            if len(part):
                yield part, buffer, buffer.put(len(part))
            while buffer.full:
                yield None, buffer, buffer.draw(rng)
        if buffer.count:
            yield None, buffer, buffer.draw(rng)

    def _assemble_fast(self, start: int, mine: tuple[int, int]) -> Iterator[torch.Tensor]:
        """Batches in the order of FAST; of a table only what the first wanted batch and later ones need is read."""
        (low, high), known = mine, self.n is not None
        epoch, unwanted = divmod(start, self.per_epoch) if known else (0, start)
        space = bits(torch.empty((2 * self.fast_buffer, self.rows.d), dtype=self.rows.dtype))
        numbers = np.empty(2 * self.fast_buffer, np.int64)
        batch, reading, skip = None, not known, unwanted * self.batch_size
        while True:
            have = given = 0
            for part, buffer, places in self._sequence(epoch):
                if part is not None:
                    if known:
                        numbers[places] = part
                    if reading:
                        space[places] = self._numbered(part) if known else bits(part)
                    continue
                given += len(places)
                if not reading and given > skip:
                    everything = np.concatenate([places, buffer.used])
                    space[everything], reading = self._numbered(numbers[everything]), True
                while len(places):
                    if batch is None:
                        batch = self._empty_batch(high - low)
                    count = min(self.batch_size - have, len(places))
                    begin, end = max(low, have), min(high, have + count)
                    if begin < end and not unwanted:
                        bits(batch)[begin - low : end - low] = space[places[begin - have : end - have]]
                    places, have = places[count:], have + count
                    if have == self.batch_size:
                        if not unwanted:
                            yield batch
                            batch = None
                        unwanted, have = max(0, unwanted - 1), 0
            if not known:
                self._enough(given, epoch)
            epoch += 1

    def _numbered(self, numbers: np.ndarray) -> np.ndarray:
        """Bits of rows by number, in the number type of the table."""
        return bits(torch.from_numpy(self.rows.take(numbers)).to(self.rows.dtype))

    def _empty_batch(self, rows: int) -> torch.Tensor:
        return torch.empty((rows, self.rows.d), dtype=self.rows.dtype, pin_memory=self.device.type == "cuda")

    def _enough(self, total: int, epoch: int) -> None:
        if total < self.batch_size:
            raise InputError(
                f"pass {epoch + 1} through the chunks gave {total} rows, a batch has {self.batch_size}; choose a "
                "smaller batch_size, and let every pass give all rows again"
            )

    def _block_pieces(self, start: int) -> Iterator[torch.Tensor | _Full]:
        epoch, batch = divmod(start, self.per_epoch)
        skip, space = batch * self.batch_size, self._space()
        while True:
            order = self._filled[self._rng(_BLOCKS, epoch).permutation(len(self._filled))]
            buffers = np.array_split(order, -(-len(order) // self.buffer_blocks))
            ends = np.cumsum([self._counts[blocks].sum() for blocks in buffers])
            for number in range(int(np.searchsorted(ends, skip, side="right")), len(buffers)):
                for block in np.sort(buffers[number]):
                    yield self._block(int(block), space)
                begin = ends[number] - self._counts[buffers[number]].sum()
                yield _Full(epoch, number, int(max(0, skip - begin)), number == len(buffers) - 1)
            epoch, skip = epoch + 1, 0

    def _chunk_pieces(self) -> Iterator[torch.Tensor | _Full]:
        capacity, epoch = self.block_rows * self.buffer_blocks, 0
        while True:
            number = filled = total = 0
            for _, chunk in self.rows.pieces():
                total += len(chunk)
                while len(chunk):
                    piece = chunk[: min(self.block_rows, capacity - filled)]
                    yield piece
                    chunk, filled = chunk[len(piece) :], filled + len(piece)
                    if filled == capacity:
                        yield _Full(epoch, number, 0, False)
                        number, filled = number + 1, 0
            self._enough(total, epoch)
            yield _Full(epoch, number, 0, True)
            epoch += 1

    def _block(self, number: int, space: torch.Tensor) -> torch.Tensor:
        """Training rows of one block, in the number type of the table; ``space`` may be used to hold them.

        Without that, blocks of many lengths would come and go and scatter over the heap.
        """
        start = number * self.block_rows
        stop = min(start + self.block_rows, self.rows.n)
        block = self.rows.read(start, stop).to(self.rows.dtype)
        if self._counts[number] < stop - start:
            whole, block = block, space[: self._counts[number]]
            np.compress(~self.held.mask(start, stop), bits(whole), axis=0, out=bits(block))
        return block

    def _space(self) -> torch.Tensor:
        return torch.empty((self.block_rows, self.rows.d), dtype=self.rows.dtype)

    def _load(self) -> torch.Tensor:
        """The whole table on the device; an array in memory that is right as it is is not copied."""
        rows, step = self.rows, max(1, 2**24 // self.rows.d)
        table = None if rows.stored else rows.read(0, rows.n)
        if table is None:
            table = torch.empty((rows.n, rows.d), dtype=rows.dtype)
            for start in range(0, rows.n, step):
                stop = min(start + step, rows.n)
                table[start:stop] = rows.read(start, stop)
        return table.to(self.device)

    def _rng(self, of: int, *numbers: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(of, *numbers)))

    # ------------------------------------------------------------------------------------------------ samples

    def sample(self, count: int, seed: int) -> np.ndarray:
        """Up to ``count`` different training rows in random order, float32 (<= count, d).

        Of a table that is not held in memory they come from whole blocks spread over it, at least 64; of chunks from
        the first buffer's worth of rows.
        """
        rng = np.random.default_rng(seed)
        if self.in_memory:
            chosen = self._train[rng.permutation(self.n)[:count]]
            return self._table[torch.from_numpy(chosen).to(self.device)].float().cpu().numpy()
        if self.n is None:
            pieces = self._chunk_pieces()
            first = torch.cat(list(itertools.takewhile(lambda piece: not isinstance(piece, _Full), pieces)))
            pieces.close()
            return first[torch.from_numpy(rng.permutation(len(first))[:count])].float().numpy()
        blocks = max(2 * self.buffer_blocks, -(-4 * count // self.block_rows))
        blocks = self._filled[spread(len(self._filled), blocks, rng)] if count < self.n else self._filled
        ends = np.cumsum(self._counts[blocks])
        chosen = spread(int(ends[-1]), count, rng)
        out = np.empty((len(chosen), self.rows.d), np.float32)
        place, space = rng.permutation(len(chosen)), self._space()
        bounds = np.searchsorted(chosen, np.concatenate([[0], ends]))
        for block, begin, low, high in zip(blocks, ends - self._counts[blocks], bounds[:-1], bounds[1:], strict=True):
            if low < high:
                picked = torch.from_numpy(chosen[low:high] - begin)
                out[place[low:high]] = self._block(int(block), space)[picked].float().numpy()
        return out

    def held_sample(self, count: int, seed: int) -> np.ndarray:
        """Up to ``count`` different held-out rows, ascending, float32 (<= count, d)."""
        chosen = self.held.rows(spread(len(self.held), count, np.random.default_rng(seed)))
        return self.rows.take(chosen) if len(chosen) else np.empty((0, self.rows.d), np.float32)

    def blocks(self) -> Iterator[np.ndarray]:
        """Training rows from first to last, block by block, float32."""
        for start, x in self.rows.blocks():
            train = ~self.held.mask(start, start + len(x))
            if train.any():
                yield x if train.all() else x[train]
