"""Generate small stories in which later sentences must agree with earlier ones.

A story has an opening, a plot and a closing, and one or two threads that open before the plot and
end later. Names, pronouns, colours, things, places and numbers return several sentences after they
first appear. To predict them, a model has to look back (attention heads), and has to know which
sound a goat makes or what a smith sells (FFN channels). All text is lower case, so that a
vocabulary of 512 tokens is enough.
"""

from collections.abc import Sequence
from random import Random

from tools.demo_model import story_parts as parts


def generate_story(rng: Random) -> str:
    """Write one story.

    Args:
        rng: Source of every choice; the same state gives the same story.

    Returns:
        One line of about 540 to 940 lower-case ASCII characters, without a newline.
    """
    plot = rng.choice(parts.PLOTS)
    slots = _draw_slots(rng)
    if plot is parts.SWAP:
        slots["keep"], slots["keep_use"] = slots["ct2"], slots["use2"]
    beats = [*parts.OPENING, *_weave(rng, plot), *parts.CLOSING]
    return " ".join(rng.choice(beat).format_map(slots) for beat in beats)


def _weave(rng: Random, plot: Sequence[parts.Beat]) -> list[parts.Beat]:
    """Open one or two threads before the plot, and end them in its second half or after it."""
    beats = list(plot)
    threads = rng.sample(parts.THREADS, rng.choice((1, 1, 1, 1, 2)))
    for _, end in threads:
        beats.insert(rng.randint(len(plot) // 2 + 1, len(beats)), end)
    return [start for start, _ in threads] + beats


def _draw_slots(rng: Random) -> dict[str, str]:
    """Draw the words of one story."""
    slots = {
        **_draw_people(rng),
        **_draw_things(rng),
        **_draw_places(rng),
        **_draw_boxes(rng),
        **_draw_count(rng),
    }
    return {**slots, **_draw_race(rng, slots), **_draw_song(rng)}


def _draw_people(rng: Random) -> dict[str, str]:
    """Draw hero, friend, elder, pet and the people of the village."""
    named = [(name, "she") for name in parts.WOMEN] + [(name, "he") for name in parts.MEN]
    (hero, hero_she), (friend, friend_she) = rng.sample(named, 2)
    pet, sound, petfood, bed = rng.choice(parts.PETS)
    (job, tool, _), (job2, tool2, goods) = rng.sample(parts.JOBS, 2)
    he, him, his = parts.PRONOUNS[hero_she]
    fhe, fhim, fhis = parts.PRONOUNS[friend_she]
    kind = "a girl" if hero_she == "she" else "a boy"
    return {
        "hero": hero, "he": he, "him": him, "his": his, "a_kind": kind,
        "friend": friend, "fhe": fhe, "fhim": fhim, "fhis": fhis,
        "elder": rng.choice(parts.ELDERS),
        "pet": pet, "petname": rng.choice(parts.PET_NAMES), "sound": sound, "petfood": petfood,
        "bed": bed, "job": job, "tool": tool, "job2": job2, "tool2": tool2, "goods": goods,
    }  # fmt: skip


def _draw_things(rng: Random) -> dict[str, str]:
    """Draw three coloured things, the food, and something to find."""
    slots = {}
    things, colours = rng.sample(parts.THINGS, 3), rng.sample(parts.COLOURS, 3)
    for mark, (thing, use), colour in zip(("", "2", "3"), things, colours, strict=True):
        slots[f"thing{mark}"], slots[f"use{mark}"], slots[f"colour{mark}"] = thing, use, colour
        slots[f"ct{mark}"] = f"{colour} {thing}"
        slots[f"a_ct{mark}"] = _with_article(f"{colour} {thing}")
    slots["keep"], slots["keep_use"] = slots["ct"], slots["use"]
    slots["food"], slots["food2"], slots["food3"] = rng.sample(parts.FOODS, 3)
    slots["trinket"] = rng.choice(parts.TRINKETS)
    return {**slots, "a_trinket": _with_article(slots["trinket"])}


def _draw_places(rng: Random) -> dict[str, str]:
    """Draw four places with their facts, three hiding places, two days and the weather."""
    slots = {}
    for mark, (place, fact) in zip(("", "2", "3", "4"), rng.sample(parts.PLACES, 4), strict=True):
        slots[f"place{mark}"], slots[f"fact{mark}"] = place, fact
    slots["spot"], slots["spot2"], slots["spot3"] = rng.sample(parts.SPOTS, 3)
    slots["day"], slots["day2"] = rng.sample(parts.DAYS, 2)
    slots["weather"], slots["weather_end"] = rng.choice(parts.WEATHERS)
    return slots


def _draw_boxes(rng: Random) -> dict[str, str]:
    """Draw three boxes with contents, and the two of them that are asked for."""
    boxes, items = rng.sample(parts.COLOURS, 3), rng.sample(parts.TRINKETS, 3)
    slots = {f"box{i}": box for i, box in enumerate(boxes, 1)}
    slots |= {f"a_item{i}": _with_article(item) for i, item in enumerate(items, 1)}
    ask, following = rng.sample(range(3), 2)
    slots |= {"ask_box": boxes[ask], "ask_item": items[ask]}
    return {**slots, "next_box": boxes[following], "next_item": items[following]}


def _draw_count(rng: Random) -> dict[str, str]:
    """Draw two numbers from two to six and add them up."""
    first, second = rng.randint(2, 6), rng.randint(2, 6)
    numbers = {
        "n": parts.NUMBERS[first],
        "m": parts.NUMBERS[second],
        "total": parts.NUMBERS[first + second],
    }
    return {**numbers, "finds": rng.choice(parts.FINDS)}


def _draw_race(rng: Random, slots: dict[str, str]) -> dict[str, str]:
    """Draw the colours of two boats and who of hero and friend wins."""
    boats = rng.sample(parts.COLOURS, 2)
    names = [slots["hero"], slots["friend"]]
    won = rng.randrange(2)
    return {
        "boat1": boats[0], "boat2": boats[1], "won_boat": boats[won], "lost_boat": boats[1 - won],
        "winner": names[won], "loser": names[1 - won],
    }  # fmt: skip


def _draw_song(rng: Random) -> dict[str, str]:
    """Draw a line of a song that is sung twice."""
    colour, other = rng.sample(parts.COLOURS, 2)
    pet, thing = rng.choice(parts.PETS)[0], rng.choice(parts.THINGS)[0]
    song = rng.choice(
        (
            f"go, little {pet}, go to the {colour} {thing}",
            f"{colour} is the {thing} and {other} is the {pet}",
            f"oh my {pet}, where did you leave the {colour} {thing}",
        )
    )
    return {"song": song, "song_pet": pet, "song_thing": thing}


def _with_article(phrase: str) -> str:
    """Put "a" or "an" before ``phrase``."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
