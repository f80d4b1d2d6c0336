"""A multiple-choice knapsack, solved exactly: one option for each item, the least sum of costs within a size.

Dynamic programming over partial choices that no other one beats in both size and cost. Three facts keep them few: what
cannot fit any more is dropped; so is what a Lagrangian bound shows to end above a choice that is known already
(cost + lambda * size is a lower bound for every lambda >= 0, https://doi.org/10.1007/978-3-540-24777-7, chapter 11).
"""

from __future__ import annotations

from collections.abc import Sequence

Option = tuple[float, float]  # size, cost
State = tuple[float, float, "tuple | None"]  # size, cost, (option, what was chosen before it)


def solve(items: Sequence[Sequence[Option]], budget: float) -> list[int] | None:
    """The index of each item's option with the least sum of costs whose sizes sum to at most `budget`.

    Of choices that cost the same, a smaller one. None: not even the smallest options fit.
    """
    budget += 1e-9 * max(abs(budget), 1.0)  # sizes are sums of floats
    if sum(min(size for size, _ in item) for item in items) > budget:
        return None
    price, known = _best_price(items, budget)
    smallest, bound = [0.0], [0.0]  # of the items from i on
    for item in reversed(items):
        smallest.append(smallest[-1] + min(size for size, _ in item))
        bound.append(bound[-1] + min(cost + price * size for size, cost in item))
    smallest.reverse()
    bound.reverse()
    limit = known + 1e-9 * max(abs(known), max((abs(cost) for item in items for _, cost in item), default=0.0))
    states: list[State] = [(0.0, 0.0, None)]
    for i, item in enumerate(items):
        grown: list[State] = []
        for size, cost, path in states:
            for number, (more, price_of) in enumerate(item):
                new_size, new_cost = size + more, cost + price_of
                if new_size + smallest[i + 1] > budget:
                    continue
                if new_cost + price * (new_size - budget) + bound[i + 1] > limit:
                    continue
                grown.append((new_size, new_cost, (number, path)))
        states = _undominated(grown)
    _, _, path = min(states, key=lambda state: (state[1], state[0]))
    chosen: list[int] = []
    while path is not None:
        number, path = path
        chosen.append(number)
    return chosen[::-1]


def _undominated(states: list[State]) -> list[State]:
    """Those that cost less than every smaller one."""
    states.sort(key=lambda state: (state[0], state[1]))
    kept: list[State] = []
    for state in states:
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    return kept


def _best_price(items: Sequence[Sequence[Option]], budget: float) -> tuple[float, float]:
    """(the price of a unit of size at which the relaxed choice just fits, the cost of that choice).

    Every item takes the option with the least cost + price * size; a higher price makes that choice smaller.
    """

    def relaxed(price: float) -> Option:
        best = [min(item, key=lambda option: (option[1] + price * option[0], option[0])) for item in items]
        return sum(size for size, _ in best), sum(cost for _, cost in best)

    size, cost = relaxed(0.0)
    if size <= budget:
        return 0.0, cost
    low, high = 0.0, 1e-12
    while relaxed(high)[0] > budget and high < 1e30:
        high *= 8
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if relaxed(middle)[0] > budget else (low, middle)
    size, cost = relaxed(high)
    if size > budget:  # costs that no price reaches: the smallest options fit
        cost = sum(min(item)[1] for item in items)
    return high, cost
