"""The prefix tree, as behaviours and compared with a dictionary of texts."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moe_worker.kvcache.pages import PagePool
from moe_worker.kvcache.prefix import MOST_HITS, PrefixTree

SIZE = 2


def make(pages=20):
    pool = PagePool(pages)
    return pool, PrefixTree(pool, SIZE)


def remember(pool, tree, tokens, namespace=""):
    """Computes a text of whole pages and leaves it in the tree, as a request does; returns its pages."""
    node, known = tree.match(tokens, namespace)
    fresh = pool.take(len(tokens) // SIZE - len(known))
    node, pages = tree.insert(node, tokens[len(known) * SIZE :], fresh)
    tree.release(node)
    return known + pages


def look_up(tree, tokens, namespace=""):
    node, pages = tree.match(tokens, namespace)
    tree.release(node)
    return pages


def test_the_longest_beginning_of_whole_pages_is_found():
    pool, tree = make()
    pages = remember(pool, tree, [1, 2, 3, 4, 5, 6])
    assert look_up(tree, [1, 2, 3, 4, 5, 6, 7]) == pages
    assert look_up(tree, [1, 2, 3, 4, 5]) == pages[:2]
    assert look_up(tree, [1, 2, 9, 9]) == pages[:1]
    assert look_up(tree, [2, 1]) == look_up(tree, [1]) == look_up(tree, []) == []


def test_no_more_pages_are_matched_than_asked_for():
    pool, tree = make()
    pages = remember(pool, tree, [1, 2, 3, 4])
    node, found = tree.match([1, 2, 3, 4], most=1)
    assert found == pages[:1]
    tree.release(node)


def test_namespaces_are_apart():
    pool, tree = make()
    remember(pool, tree, [1, 2], "a")
    assert look_up(tree, [1, 2], "b") == []
    assert remember(pool, tree, [1, 2], "b") != look_up(tree, [1, 2], "a")


def test_a_page_of_the_same_text_is_given_back_for_the_one_in_the_tree():
    pool, tree = make()
    first, second = tree.match([1, 2, 3, 4])[0], tree.match([1, 2, 3, 4])[0]
    mine, other = pool.take(2), pool.take(2)
    assert tree.insert(first, [1, 2, 3, 4], mine)[1] == mine
    assert tree.insert(second, [1, 2, 3, 4], other)[1] == mine
    assert pool.used == tree.pages == 2


def test_pages_in_use_are_not_evicted_and_idle_ones_go_from_the_end_of_the_text():
    pool, tree = make()
    remember(pool, tree, [1, 2, 3, 4, 5, 6])
    node, used = tree.match([1, 2])
    assert (tree.idle, tree.evict(1)) == (2, 1)
    assert look_up(tree, [1, 2, 3, 4, 5, 6]) == used + look_up(tree, [1, 2, 3, 4])[1:]
    assert (tree.evict(9), tree.pages, tree.evictions) == (1, 1, 2)
    tree.release(node)
    assert (tree.evict(9), pool.free) == (1, 20)


def test_what_was_used_last_stays_longest():
    pool, tree = make()
    for token in (1, 2, 3):
        remember(pool, tree, [token, 0])
    look_up(tree, [1, 0])
    tree.evict(1)
    assert [bool(look_up(tree, [token, 0])) for token in (1, 2, 3)] == [True, False, True]


def test_a_text_with_hits_outlives_a_burst_of_new_ones_but_not_for_ever():
    pool, tree = make(pages=20)

    def burst(count, start):
        for number in range(start, start + count):
            tree.evict(1 - pool.free)
            remember(pool, tree, [100 + number, 0])

    burst(19, 0)
    remember(pool, tree, [7, 7])
    for _ in range(MOST_HITS):
        look_up(tree, [7, 7])
    burst(40, 1000)
    assert look_up(tree, [7, 7])
    burst(20 * (MOST_HITS + 2), 10_000)
    assert not look_up(tree, [7, 7])


def test_a_small_cache_does_not_keep_what_was_popular_once():
    """Sessions that follow one another, each with a prompt that grows: a constant credit kept old ones."""
    pool, tree = make(pages=8)
    hits = 0
    for session in range(50):
        for turn in range(1, 6):
            tokens = [session] * (2 * turn)
            node, pages = tree.match(tokens)
            hits += len(pages)
            rest = turn - len(pages)
            tree.evict(rest - pool.free)
            tree.release(tree.insert(node, tokens[2 * len(pages) :], pool.take(rest))[0])
    assert hits == 50 * (0 + 1 + 2 + 3 + 4)


def test_a_namespace_may_be_forgotten_while_an_empty_text_of_it_is_held():
    pool, tree = make()
    node, _ = tree.match([5, 6], "a")
    remember(pool, tree, [1, 2], "a")
    held, _ = tree.match([3, 4], "a")
    tree.evict(1)
    for holder, tokens in ((node, [5, 6]), (held, [3, 4])):
        tree.release(tree.insert(holder, tokens, pool.take(1))[0])
    assert look_up(tree, [5, 6], "a")
    assert look_up(tree, [3, 4], "a")


def test_pages_that_are_not_whole_are_refused():
    pool, tree = make()
    with pytest.raises(ValueError, match="3 tokens do not fill 2 pages of 2 tokens"):
        tree.insert(tree.match([])[0], [1, 2, 3], pool.take(2))


TEXTS = st.lists(st.sampled_from([(0, 0), (0, 1)]), max_size=5).map(
    lambda pairs: [token for pair in pairs for token in pair]
)


class Tree(RuleBasedStateMachine):
    """The model: page, usefulness and hits for each text that ends with a page, found by brute force."""

    @initialize(pages=st.integers(1, 16))
    def start(self, pages):
        self.pool, self.tree = make(pages)
        self.known, self.holders, self.lookups = {}, [], 0

    def path(self, space, tokens):
        return [(space, *tokens[:end]) for end in range(SIZE, len(tokens) + 1, SIZE)]

    def use(self, text):
        page, _, hits = self.known[text]
        useful = self.lookups + self.tree.lifetime * min(hits + 1, MOST_HITS)
        self.known[text] = (page, useful, hits + 1)

    @rule(tokens=TEXTS, space=st.sampled_from("ab"))
    def request(self, tokens, space):
        """A request begins with what is known; it will compute the rest."""
        self.lookups += 1
        node, pages = self.tree.match(tokens, space)
        path = self.path(space, tokens)
        expected = [text for index, text in enumerate(path) if set(path[: index + 1]) <= set(self.known)]
        assert pages == [self.known[text][0] for text in expected]
        for text in expected:
            self.use(text)
        self.holders.append([node, space, tokens, len(pages)])

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def fill_a_page(self, data):
        holder = data.draw(st.sampled_from(self.holders))
        node, space, tokens, count = holder
        if count * SIZE == len(tokens) or not self.pool.free:
            return
        (page,) = self.pool.take(1)
        end = (count + 1) * SIZE
        holder[0], (kept,) = self.tree.insert(node, tokens[count * SIZE : end], [page])
        holder[3] += 1
        text = (space, *tokens[:end])
        if text in self.known:
            self.use(text)
        else:
            self.known[text] = (page, self.lookups, 0)
        assert kept == self.known[text][0]

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def end(self, data):
        holder = data.draw(st.sampled_from(self.holders))
        self.holders.remove(holder)
        self.tree.release(holder[0])

    @rule()
    def evict(self):
        """Exactly one text goes: a least useful one of those that nobody uses and nothing follows."""
        candidates = {
            text: useful
            for text, (_, useful, _) in self.known.items()
            if text not in self.in_use()
            and not any(len(other) > len(text) and other[: len(text)] == text for other in self.known)
        }
        freed = self.tree.evict(1)
        gone = [text for text in self.known if not self.pool.references(self.known[text][0])]
        assert freed == len(gone) == min(1, len(candidates))
        for text in gone:
            assert candidates[text] == min(candidates.values())
            del self.known[text]

    def in_use(self):
        return {
            text
            for _, space, tokens, count in self.holders
            for text in self.path(space, tokens[: count * SIZE])
        }

    @invariant()
    def every_page_is_accounted_for(self):
        if hasattr(self, "tree"):
            assert self.pool.used == self.tree.pages == len(self.known)
            assert self.tree.idle == len(set(self.known) - self.in_use())
            assert len({page for page, _, _ in self.known.values()}) == len(self.known)

    def teardown(self):
        if hasattr(self, "tree"):
            for node, *_ in self.holders:
                self.tree.release(node)
            assert self.tree.evict(self.pool.pages + 1) == len(self.known)
            assert self.pool.used == self.tree.pages == self.tree.idle == 0


TestTree = Tree.TestCase
TestTree.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
