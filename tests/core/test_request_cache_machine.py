"""Whatever requests do in whatever order, each reads in its blocks what it or an equal prompt wrote there.

The model keeps what was written to every block of every group, on the device and on the host, and searches
it from end to end. More than 300 lines because it knows all that the real one knows, by other means.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from turboquant_core.request_cache import CacheManager, RequestCache, Visibility
from turboquant_core.timeline import Timeline

Content = tuple[bytes, bytes, bool]
"""What a block holds: salt, all tokens up to its end, and whether a prompt's cut made it."""


@dataclass(frozen=True)
class Setup:
    timeline: Timeline
    groups: tuple[tuple[Visibility, int], ...]
    num_slots: int = 4
    num_host_blocks: int = 0


SETUPS = (
    Setup(
        Timeline(4, 64, 128), ((Visibility(), 24), (Visibility(window=100), 9), (Visibility(chunk=192), 12))
    ),
    Setup(
        Timeline(4, 64, 128),
        ((Visibility(), 24), (Visibility(window=100), 9), (Visibility(chunk=192), 12)),
        num_host_blocks=12,
    ),
    Setup(Timeline(4, 64, 128), ((Visibility(), 14),), num_host_blocks=100),
    Setup(Timeline(4, 64, 128), ((Visibility(), 11),), num_host_blocks=6),
    Setup(Timeline(0, 0, 64), ((Visibility(window=130), 6), (Visibility(chunk=150), 8)), num_host_blocks=3),
    Setup(Timeline(4, 128, 192), ((Visibility(), 40), (Visibility(window=64), 40)), num_slots=3),
    Setup(Timeline(6, 64, 128), ((Visibility(window=70), 5), (Visibility(), 18)), 6, num_host_blocks=30),
)


@dataclass
class Host:
    """Which contents lie in the host's memory of a group, the least recently used first."""

    num_blocks: int
    contents: list[Content] = field(default_factory=list)
    moving: list[Content] = field(default_factory=list)

    def use(self, content: Content) -> None:
        self.contents.remove(content)
        self.contents.append(content)

    def keep(self, content: Content) -> None:
        if content in self.contents:
            self.use(content)
            return
        if len(self.contents) == self.num_blocks:
            if not self.contents or self.contents[0] in self.moving:
                return
            del self.contents[0]
        self.contents.append(content)
        self.moving.append(content)

    def hold(self, contents: list[Content]) -> None:
        self.moving += contents
        for content in reversed(contents):
            self.use(content)


@dataclass
class Running:
    cache: RequestCache
    tokens: bytes
    num_prompt_tokens: int
    salt: bytes
    num_computed: int
    num_published: int
    num_at_open: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_at_open = len(self.tokens)


class RequestCacheMachine(RuleBasedStateMachine):
    running: list[Running]
    waiting: list[Running]

    @initialize(setup=st.sampled_from(SETUPS))
    def start(self, setup: Setup) -> None:
        self.timeline = setup.timeline
        self.num_blocks = [num_blocks for _, num_blocks in setup.groups]
        self.visibilities = [visibility for visibility, _ in setup.groups]
        self.num_slots = setup.num_slots
        self.manager = CacheManager(
            self.timeline,
            self.visibilities,
            self.num_blocks,
            setup.num_slots,
            caches_prefixes=True,
            num_host_blocks=setup.num_host_blocks,
        )
        self.groups = range(len(setup.groups))
        self.running, self.waiting = [], []
        self.written: list[dict[int, Content]] = [{} for _ in self.groups]
        self.findable: list[dict[Content, int]] = [{} for _ in self.groups]
        self.hosts = [Host(setup.num_host_blocks) for _ in self.groups]
        self.host_memory: list[dict[int, Content]] = [{} for _ in self.groups]
        self.allocated: list[set[int]] = [set() for _ in self.groups]

    # What the model knows.

    def block_end(self, index: int) -> int:
        return self.timeline.num_sinks + 64 * (index + 1)

    def num_cut_blocks(self, num_tokens: int) -> int:
        """Count the blocks before the last cut of a prompt of which so many tokens are computed."""
        size = self.timeline.segment_size
        return (
            max(size * n for n in range(100) if n == 0 or self.block_end(size * n // 64 - 1) <= num_tokens)
            // 64
        )

    def content(self, tokens: bytes, num_prompt_tokens: int, salt: bytes, index: int) -> Content:
        last_cut = num_prompt_tokens - max(1, self.timeline.residual_length)
        return salt, tokens[: self.block_end(index)], index < self.num_cut_blocks(last_cut)

    def is_seen(self, group: int, index: int, position: int) -> bool:
        """Return whether a query sees the last token of a block; if not, it sees none of it."""
        visibility, key = self.visibilities[group], self.block_end(index) - 1
        if visibility.window is not None:
            return key > position - visibility.window
        return visibility.chunk is None or key // visibility.chunk == position // visibility.chunk

    def owned(self, group: int) -> set[int]:
        tables = (request.cache.block_tables[group] for request in self.running)
        return {block_id for table in tables for block_id in table if block_id is not None}

    def expected_hit(self, tokens: bytes, num_prompt_tokens: int, salt: bytes) -> int:
        """Try every prefix, from the longest on, that ends at a cut and leaves the residual."""
        num_blocks = self.num_cut_blocks(num_prompt_tokens - max(1, self.timeline.residual_length))
        for n in range(num_blocks, 0, -self.timeline.segment_size // 64):
            contents = [self.content(tokens, num_prompt_tokens, salt, i) for i in range(n)]
            if all(
                contents[i] in self.findable[group]
                or contents[i] in self.hosts[group].contents
                or not self.is_seen(group, i, self.block_end(n - 1))
                for group in self.groups
                for i in range(n)
            ):
                return n
        return 0

    def most_held(self, group: int, num_blocks: int) -> int:
        """Return the bound that the contract gives: what a window and a segment hold."""
        visibility = self.visibilities[group]
        reach = visibility.window or visibility.chunk
        if reach is None:
            return num_blocks
        return min(num_blocks, -(-(reach - 1) // 64) + self.timeline.segment_size // 64)

    def forget(self, group: int, block_ids: list[int]) -> None:
        """Note that blocks were allocated: nobody else may own them, and what they held is on the host."""
        assert len(set(block_ids)) == len(block_ids)
        known = self.findable[group]
        contents = {block_id: content for content, block_id in known.items()}
        for block_id in block_ids:
            if block_id in contents:
                self.hosts[group].keep(contents[block_id])
                del known[contents[block_id]]
        self.allocated[group].update(block_ids)

    def move(self) -> None:
        """Copy what a step has to copy; what allocated blocks held is gone then."""
        for group, moves in zip(self.groups, self.manager.take_moves(), strict=True):
            written, memory = self.written[group], self.host_memory[group]
            assert len({host_id for _, host_id in moves.to_host}) == len(moves.to_host)
            for block_id, host_id in moves.to_host:
                memory[host_id] = written[block_id]
            for block_id in self.allocated[group]:
                written.pop(block_id, None)
            assert len({block_id for block_id, _ in moves.to_device}) == len(moves.to_device)
            for block_id, host_id in moves.to_device:
                written[block_id] = memory[host_id]
            self.allocated[group].clear()
            self.hosts[group].moving.clear()
            host_ids = self.manager.tiers[group]._host_ids.values()
            assert [memory[host_id] for host_id in host_ids] == self.hosts[group].contents

    # What requests do.

    def has_slot(self) -> bool:
        return len(self.running) < self.num_slots

    @precondition(has_slot)
    @rule(
        letters=st.lists(st.sampled_from([0, 0, 0, 1]), min_size=2, max_size=6),
        missing=st.integers(0, 190),
        salt=st.sampled_from([*[b""] * 7, b"a"]),
    )
    def open(self, letters: list[int], missing: int, salt: bytes) -> None:
        size = self.timeline.segment_size
        tokens = bytes(self.timeline.num_sinks) + b"".join(bytes([letter] * size) for letter in letters)
        tokens = tokens[: max(1, len(tokens) - missing)]
        self._open(tokens, len(tokens), salt)

    @precondition(lambda self: self.waiting and self.has_slot())
    @rule(data=st.data())
    def open_again(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.waiting) - 1))
        request = self.waiting[index]
        if self._open(request.tokens, request.num_prompt_tokens, request.salt):
            del self.waiting[index]

    def _open(self, tokens: bytes, num_prompt_tokens: int, salt: bytes) -> bool:
        n = self.expected_hit(tokens, num_prompt_tokens, salt)
        num_blocks = self.timeline.num_blocks(len(tokens), num_prompt_tokens)
        hits: list[list[int | None]] = []
        missing: list[list[int]] = []
        fits = True
        for group in self.groups:
            contents = [self.content(tokens, num_prompt_tokens, salt, i) for i in range(n)]
            is_seen = [self.is_seen(group, i, self.block_end(n - 1)) for i in range(n)]
            found = [self.findable[group].get(c) for c in contents]
            hit = [block_id if s else None for block_id, s in zip(found, is_seen, strict=True)]
            taken = self.owned(group) | {block_id for block_id in hit if block_id is not None}
            num_new = self.most_held(group, num_blocks - is_seen.count(False)) - n + hit.count(None)
            fits = fits and num_new <= self.num_blocks[group] - len(taken)
            hits.append(hit)
            missing.append([i for i in range(n) if is_seen[i] and hit[i] is None])
        owned = [self.owned(group) for group in self.groups]
        cache = self.manager.open(list(tokens), num_prompt_tokens, salt)
        assert (cache is not None) == fits
        if cache is None:
            alone = self.manager.can_ever_hold(len(tokens), num_prompt_tokens)
            assert self.running or not alone
            return False
        num_hit_tokens = self.block_end(n - 1) if n else 0
        assert cache.num_hit_tokens == num_hit_tokens
        for group in self.groups:
            table, hit = cache.block_tables[group], hits[group]
            assert all(table[i] == hit[i] for i in range(n) if i not in missing[group])
            assert len(table) == (num_blocks if self.visibilities[group] == Visibility() else n)
            new = [table[i] for i in (*missing[group], *range(n, len(table)))]
            assert None not in new and not {*owned[group], *hit} & set(new)
            fetched = {
                self.content(tokens, num_prompt_tokens, salt, i): block_id
                for i in missing[group]
                if (block_id := table[i]) is not None
            }
            self.hosts[group].hold(list(fetched))
            self.forget(group, [block_id for block_id in new if block_id is not None])
            self.findable[group] |= fetched
        self.running.append(Running(cache, tokens, num_prompt_tokens, salt, num_hit_tokens, n))
        return True

    @precondition(lambda self: self.running)
    @rule(
        data=st.data(), num_steps=st.sampled_from([1, 3, 8]), publishes=st.sampled_from([True, True, False])
    )
    def compute(self, data: st.DataObject, num_steps: int, publishes: bool) -> None:
        request = data.draw(st.sampled_from(self.running))
        for _ in range(num_steps):
            if not self._compute(request, data):
                break
            if publishes:
                self._publish(request)

    def _compute(self, request: Running, data: st.DataObject) -> bool:
        """Run one step."""
        num_chunks = data.draw(st.sampled_from([1, 1, 1, 2, 3]))
        chunks = self._next_chunks(request, data, num_chunks)
        start, end = chunks[0][0], chunks[-1][1]
        before = [list(table) for table in request.cache.block_tables]
        owned = [self.owned(group) for group in self.groups]
        has_room = request.cache.extend(start, end)
        for group in self.groups:
            table, old = request.cache.block_tables[group], before[group]
            num_dropped = sum(not self.is_seen(group, i, start) for i in range(len(old)))
            assert table[: len(old)] == [None] * num_dropped + old[num_dropped:]
            new = table[len(old) :]
            assert None not in new and not owned[group] & {*new} - {*old[:num_dropped]}
            self.forget(group, [block_id for block_id in new if block_id is not None])
            assert has_room or not new
        if not has_room:
            alone = self.manager.can_ever_hold(end, request.num_prompt_tokens)
            assert len(self.running) > 1 or len(chunks) > 1 or not alone
            return False
        self.move()
        for chunk in chunks:
            self._compute_chunk(request, *chunk)
        request.num_computed = end
        return True

    def _next_chunks(self, request: Running, data: st.DataObject, num_chunks: int) -> list[tuple[int, int]]:
        start = request.num_computed
        if start == len(request.tokens):
            request.tokens += bytes([data.draw(st.integers(0, 1))] * data.draw(st.sampled_from([1, 30, 64])))
        chunks: list[tuple[int, int]] = []
        while start < len(request.tokens) and len(chunks) < num_chunks:
            end = min(self.timeline.chunk_end(start, request.num_prompt_tokens), len(request.tokens))
            if start >= request.num_prompt_tokens:
                end = data.draw(st.sampled_from([end, end, start + 1]))
            chunks.append((start, end))
            start = end
        return chunks

    def _compute_chunk(self, request: Running, start: int, end: int) -> None:
        """Read all that the chunk's first query sees of its blocks, then write those that become due."""
        timeline, num_prompt_tokens = self.timeline, request.num_prompt_tokens
        for group in self.groups:
            table = request.cache.block_tables[group]
            contents = [
                self.content(request.tokens, num_prompt_tokens, request.salt, i) for i in range(len(table))
            ]
            for i in range(timeline.num_visible_blocks(start, num_prompt_tokens)):
                block_id = table[i]
                if self.is_seen(group, i, start):
                    assert block_id is not None and self.written[group][block_id] == contents[i]
            others = {
                block_id
                for other in self.running
                if other is not request
                for block_id in other.cache.block_tables[group]
            }
            due = range(*(timeline.num_blocks(n, num_prompt_tokens) for n in (start, end)))
            for i in due:
                block_id = table[i]
                assert block_id is not None and block_id not in others
                self.written[group][block_id] = contents[i]

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        self._publish(data.draw(st.sampled_from(self.running)))

    def _publish(self, request: Running) -> None:
        request.cache.publish(request.num_computed)
        last_cut = request.num_prompt_tokens - max(1, self.timeline.residual_length)
        num_blocks = self.num_cut_blocks(min(request.num_computed, last_cut))
        for group in self.groups:
            for i in range(request.num_published, num_blocks):
                block_id = request.cache.block_tables[group][i]
                if block_id is not None:
                    content = self.content(request.tokens, request.num_prompt_tokens, request.salt, i)
                    self.findable[group].setdefault(content, block_id)
        request.num_published = max(request.num_published, num_blocks)

    @precondition(lambda self: self.has_slot() and any(r.num_computed >= r.num_at_open for r in self.running))
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from([r for r in self.running if r.num_computed >= r.num_at_open]))
        cache = request.cache.fork()
        assert cache is not None and cache.block_tables == request.cache.block_tables
        fork = Running(
            cache,
            request.tokens[: request.num_computed],
            request.num_prompt_tokens,
            request.salt,
            request.num_computed,
            request.num_published,
        )
        self.running.append(fork)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), is_preempted=st.sampled_from([True, True, False]))
    def release(self, data: st.DataObject, is_preempted: bool) -> None:
        request = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        request.cache.release()
        if is_preempted:
            self.waiting.append(request)

    @invariant()
    def agree(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check_integrity()
        assert self.manager.num_running == len(self.running)
        assert len({request.cache.slot for request in self.running}) == len(self.running)
        assert self.manager.num_free_blocks == [
            num_blocks - len(self.owned(group))
            for group, num_blocks in zip(self.groups, self.num_blocks, strict=True)
        ]
        assert [tier.num_held for tier in self.manager.tiers] == [len(host.contents) for host in self.hosts]


TestRequestCaches = RequestCacheMachine.TestCase
TestRequestCaches.settings = settings(
    max_examples=250, stateful_step_count=50, deadline=None, derandomize=True
)
