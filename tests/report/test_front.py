import itertools
import math

import pytest

from lpdeploy.report.front import find_front


def test_the_front_is_what_no_point_beats():
    points = [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.0, 3.0), (4.0, 1.0)]
    assert find_front(points) == (1, 2, 0)


def test_points_that_are_equal_share_the_front():
    assert find_front([(1.0, 1.0), (1.0, 1.0), (1.0, 2.0)]) == (0, 1)


def test_what_is_not_known_or_not_finite_is_on_no_front():
    assert find_front([None, (1.0, math.nan), (math.inf, 0.0), (5.0, 5.0)]) == (3,)
    assert find_front([]) == ()
    assert find_front([None]) == ()


@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_the_order_of_the_points_does_not_matter(order):
    points = [(1.0, 4.0), (2.0, 2.0), (3.0, 3.0), (4.0, 1.0)]
    found = find_front([points[place] for place in order])
    assert [points[order[place]] for place in found] == [points[0], points[1], points[3]]
