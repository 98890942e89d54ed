"""The words, facts and sentence templates of the demo stories, in lower-case ASCII.

`story_grammar.py` combines them. A template has slots in braces, which `_draw_slots` fills there.
"""

Beat = tuple[str, ...]
"""The ways to tell one step of a story, of which one is drawn."""


def _words(text: str) -> tuple[str, ...]:
    """Split a list of words at white space."""
    return tuple(text.split())


def _beats(text: str) -> tuple[Beat, ...]:
    """Split templates into beats: each paragraph is a beat, and each line a way to tell it."""
    return tuple(tuple(beat.split("\n")) for beat in text.strip().split("\n\n"))


WOMEN = _words("mia anna lily emma nora rosa clara ida zoe lucy maya ruth vera jane")
MEN = _words("tom ben leo max finn otto hugo sam jack oscar noah adam felix paul")
PET_NAMES = _words("button pepper biscuit pickle clover marble nutmeg pudding velvet ginger")
COLOURS = _words("red blue green yellow white black brown grey pink orange silver golden")
FOODS = _words("bread cheese plums honey soup pears cake nuts jam")
TRINKETS = _words("coin feather shell ring key bean pearl stamp")
FINDS = _words("shells feathers acorns stones eggs")
NUMBERS = _words("zero one two three four five six seven eight nine ten eleven twelve")
DAYS = _words("monday tuesday friday saturday sunday")
PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "him", "his")}
ELDERS = _words("grandmother mother aunt grandfather father uncle")
SPOTS = (
    *("under the bed", "behind the door", "in the stove", "beside the well", "under the stairs"),
    *("behind the curtain", "on the cupboard", "in the hollow tree", "under a flat stone"),
    "in a pile of leaves",
)
# A pet, the sound it makes, what it eats, and where it sleeps.
PETS = (
    ("cat", "meowed", "a little fish", "in a basket"),
    ("dog", "barked", "a big bone", "in the kennel"),
    ("goat", "bleated", "fresh hay", "in the shed"),
    ("duck", "quacked", "two snails", "by the pond"),
    ("hen", "clucked", "ripe corn", "in the coop"),
    ("mouse", "squeaked", "a few crumbs", "in a shoe"),
    ("donkey", "brayed", "two carrots", "in the barn"),
    ("pig", "grunted", "a sweet apple", "in the straw"),
)
# A thing, and what people like to do with it.
THINGS = (
    ("kite", "fly it over the hill"),
    ("ball", "throw it high"),
    ("drum", "beat it softly"),
    ("lamp", "light it in the evening"),
    ("hat", "wear it to school"),
    ("scarf", "wrap it around twice"),
    ("book", "read it aloud"),
    ("bell", "ring it at noon"),
    ("cup", "fill it with warm milk"),
    ("flute", "play it by the window"),
    ("spoon", "stir the soup with it"),
    ("blanket", "sleep under it"),
    ("whistle", "blow it three times"),
    ("wagon", "pull it up the road"),
    ("bucket", "fill it with sand"),
    ("spade", "dig holes with it"),
    ("basket", "fill it with roses"),
    ("brush", "paint with it"),
)
# A place, and what happens there.
PLACES = (
    ("mill", "the great wheel turned"),
    ("market", "people sang"),
    ("forest", "the pines whispered"),
    ("river", "the water ran clear and cold"),
    ("hill", "the wind blew hard"),
    ("garden", "bees hummed in the roses"),
    ("bridge", "carts rumbled along"),
    ("tower", "the clock struck the hour"),
    ("lake", "swans drifted past"),
    ("school", "a bell rang"),
    ("farm", "the cows came home"),
    ("beach", "gulls cried above the sand"),
)
# A trade, its tool, and what people fetch there.
JOBS = (
    ("baker", "a rolling pin", "a loaf of rye"),
    ("smith", "a heavy hammer", "a box of nails"),
    ("miller", "a broom", "a sack of flour"),
    ("tailor", "a long needle", "a mended coat"),
    ("fisher", "a wet net", "a pair of trout"),
    ("gardener", "a rake", "a bunch of roses"),
    ("painter", "a ladder", "a pot of paint"),
    ("potter", "a lump of clay", "a round jug"),
)
# The weather, and how it ends.
WEATHERS = (
    ("it was raining", "the rain stopped"),
    ("it was snowing", "the snow began to melt"),
    ("the wind was strong", "the wind died down"),
    ("the fog was thick", "the fog lifted"),
    ("the sun was very hot", "the air grew cool"),
    ("thunder rolled", "the thunder moved on"),
)

OPENING = _beats("""
once there was {a_kind} named {hero}, who lived near the {place}.
near the {place} there lived {a_kind} called {hero}.
in a house by the {place} lived {a_kind} named {hero}.
there was once {a_kind} named {hero}, and the {place} was {his} home.
long ago {a_kind} named {hero} lived not far from the {place}.

{he} had {a_ct} and liked to {use}.
{he} loved {his} {ct}, and every day {he} would {use}.
{his} {elder} had given {him} {a_ct}, and {he} liked to {use}.
of all things {he} loved {his} {ct}, for {he} could {use}.

{he} also had a {pet} named {petname}, and {his} best friend was {friend}.
{he} lived with {petname} the {pet}, and {friend} lived next door.
{his} best friends were {friend} and {petname} the {pet}.
where {he} went, {petname} the {pet} went too, and so did {his} friend {friend}.
""")
CLOSING = _beats("""
in the evening {hero} took the {keep} and went home to {his} house by the {place}.
at night {hero} went back to the {place} with the {keep} in {his} arms.
then {hero} put the {keep} away, for it was too late to {keep_use}.
in bed {hero} thought of the {keep} and wanted to {keep_use} again.
that night {hero} told {his} {elder} about {friend} and about the {keep}.

then {petname} the {pet} {sound} and went to sleep {bed}.
the {pet} got {petfood}, {sound}, and {petname} was happy.
and {petname} lay down {bed}, as every {pet} does.
"good night, {petname}," said {hero}, and the {pet} {sound}.
{petname} {sound} at the door, as a good {pet} does.
""")
# Each thread opens before the plot, and ends in it or after it.
THREADS = tuple(
    _beats(text)
    for text in (
        """
that morning {weather}.
when {hero} woke up, {weather}.
outside {weather}.

after a while {weather_end}.
then {weather_end} at last.
soon {weather_end}.
""",
        """
that day {petname} had eaten nothing yet.
now {petname} was hungry and {sound}.

the {pet} was given {petfood}, and {petname} was glad.
then {friend} gave {petname} {petfood}, for it was a {pet}.
""",
        """
on the road stood the {job} with {tool}.
the {job} came by with {tool} and said good day.

then the {job} came again, still with {tool}.
far away they saw {tool}, so they knew it was the {job}.
""",
        """
that day {friend} had promised to bring some {food3}.
"i will bring you some {food3} today," {friend} had said.

so {friend} kept {fhis} promise and shared some {food3} with {hero}.
they sat down and ate the {food3} that {friend} had promised.
""",
        """
that night {hero} had dreamed of {a_ct3}.
in a dream an owl had told {him}, "look for {a_ct3}."

by the path lay {a_ct3}, just as in the dream of {hero}.
then they saw {a_ct3}, and {hero} told {friend} about {his} dream.
""",
        """
it was {day}, and the day was long.
on {day} everything began.

it was a good {day}.
so that was the {day} of {hero} and {friend}.
""",
    )
)
LOST = _beats("""
one day {hero} put the {ct} {spot} and forgot about it.
one morning {he} left the {ct} {spot} and went out to play.

later {he} asked, "where is my {thing}?"
"my {ct} is gone!" cried {hero}.

then {friend} looked {spot2}, but there was only {a_trinket}.
"maybe it is {spot2}," said {friend}. they looked there and found {a_trinket}.

then {petname} {sound}, and there it was, {spot}.
at last {hero} knew where it was. {he} looked {spot}, and there lay the {thing}.
then {his} {elder} said, "did you look {spot}?" and there it was.

so {friend} kept the {trinket}, and {hero} kept the {colour} {thing}.
"never again {spot}," said {hero}, and {he} gave {friend} the {trinket}.
""")
GIFT = _beats("""
on the birthday of {hero}, {friend} brought {him} {a_ct2}.
"this is for you," said {friend}, and {fhe} gave {hero} {a_ct2}.

{his} {elder} brought some {food} and said that a friend is the best gift.
the friends were so glad that they ran to get some {food}.

"now i can {use2}!" said {hero}.
so {hero} thanked {fhim}, for now {he} could {use2}.

"who gave you the {thing2}?" asked {his} {elder}. "it was {friend}," said {hero}.
so now {hero} had two things, the {ct} and the {ct2} from {friend}.

they ate the {food} together until nothing was left.
there they had {food} until the evening.
""")
SWAP = _beats("""
one day {friend} had {a_ct2}, and {hero} looked at it for a long time.
one day {friend} came along with {a_ct2} and showed how to {use2}.

"i will give you my {ct} for your {ct2}," said {hero}.
"do you want to trade?" asked {hero}. "my {thing} for your {thing2}?"

so {friend} said yes, for {fhe} wanted to {use}.
"yes," said {friend}, "i have always wanted to {use}."

so {hero} got the {ct2}, and {friend} got the {ct}.
now {hero} had the {ct2}, and {friend} had the {ct}.

"where is your {thing}?" asked {his} {elder}. "{friend} has it," said {hero}.
all day {friend} kept the {thing} and {hero} kept the {thing2}.
""")
RACE = _beats("""
the two friends raced their paper boats on the pond behind the {place2}.
there was a boat race on the pond near the {place2}, where {fact2}.

the boat of {hero} was {boat1}, and the boat of {friend} was {boat2}.
now {friend} had a boat of {boat2} paper and {hero} had one of {boat1} paper.

"the first boat wins some {food}," said the {job}.
the {job} held up some {food} and said that it was the prize.

the {lost_boat} boat stood still, but the {won_boat} boat went on.
for a time the {lost_boat} boat led, but the {won_boat} boat was the first to come home.

so {winner} won, and {winner} shared the {food} with {loser}.
so the {food} went to {winner}, and {loser} clapped.
""")
HIDE = _beats("""
one day {petname} wanted to play and hid {spot}.
that day {petname} crept away and sat very still {spot}.

"where is my {pet}?" asked {hero}.
then {hero} called for {petname}, but all was quiet.

{he} looked {spot2}, and {friend} looked {spot3}.
so {friend} looked {spot3}, and {hero} looked {spot2}.

nothing was {spot2} but {a_trinket}, and {spot3} there was only dust.
so {hero} found only {a_trinket} {spot2}, and {friend} found only dust {spot3}.

then something {sound}, and the sound came from {spot}. it was {petname}!
at last {friend} put down {petfood}, and {petname} {sound} and came out. it had been {spot}!
""")
BOXES = _beats("""
{his} {elder} had three boxes in the house.
one day {hero} and {friend} found three boxes.

in the {box1} box was {a_item1}, in the {box2} box {a_item2}, in the {box3} box {a_item3}.
the {box1} box held {a_item1}, the {box2} one {a_item2} and the {box3} one {a_item3}.

"please bring me the {ask_item}," said {his} {elder}. so {hero} opened the {ask_box} box.
{his} {elder} needed the {ask_item}, and {hero} knew that it was in the {ask_box} box.

then {friend} opened the {next_box} box and took out the {next_item}.
"and what is in the {next_box} box?" asked {friend}. "the {next_item}," said {hero}.

so {hero} got the {ask_item}, and the {ask_box} box stayed empty.
{his} {elder} thanked {hero} for the {ask_item} and let {friend} keep the {next_item}.
""")
WALK = _beats("""
one day {hero} and {friend} went for a long walk.
{his} {elder} sent {hero} and {friend} for a walk.

first they came to the {place2}, where {fact2}.
they started at the {place2}, and there {fact2}.

then they came to the {place3}, where {fact3}.
after that they saw the {place3}, and there {fact3}.

last of all they saw the {place4}, where {fact4}.
at noon they stood at the {place4}, and there {fact4}.

on the way back they passed the {place4}, then the {place3}, and then the {place2}.
on the way home they passed the {place3} and then the {place2}.

"i liked the {place3} best," said {hero}, for there {fact3}.
"i liked the {place2} best," said {friend}, for there {fact2}.
""")
PICNIC = _beats("""
they planned a picnic at the {place2} for {day2}.
"let us meet at the {place2} on {day2}," said {friend}.

"i will bring some {food}," said {hero}. "and i will bring some {food2}," said {friend}.
so {friend} wanted to bring the {food2} and {hero} the {food}.

when {day2} came, they met at the {place2}, where {fact2}.
on {day2} {hero} was the first at the {place2}, and there {fact2}.

there {hero} had the {food} with {him}, and {friend} had the {food2}.
then {friend} took out the {food2}, and {hero} took out the {food}.

but {petname} liked the {food2} of {friend} and not the {food} of {hero}.
only {petname} wanted neither {food} nor {food2}, but {petfood}.
""")
COUNT = _beats("""
so {hero} and {friend} went to the {place2} to look for {finds}.
at the {place2}, where {fact2}, there were {finds} to be found.

first {hero} found {n} {finds}.
soon {hero} came back with {n}.

then {friend} found {m} {finds}.
and {friend} came back with {m}.

now {n} and {m} make {total}, so together they had {total} {finds}.
they counted them all. "{total}!" they cried.

"{n} for {hero} and {m} for {friend}," said the {job}.
so {friend} kept {fhis} {m} {finds}, and {hero} kept {his} {n}.
""")
ERRAND = _beats("""
"go to the {job2}," said {his} {elder}, "and fetch {goods}."
{his} {elder} needed {goods}, so {hero} had to go to the {job2}.

with {friend} {he} went past the {place2}, where {fact2}.
the way led by the {place2}, and there {fact2}.

the {job2} stood at the door with {tool2}.
they found the {job2} at work with {tool2}.

"i know what you need," said the {job2} and gave them {goods}.
then {hero} paid one {colour2} coin for {goods} and thanked the {job2}.

{his} {elder} liked {goods} and gave them some {food}.
back home {his} {elder} got {goods}, and {hero} and {friend} got some {food}.
""")
SONG = _beats("""
one day {friend} sang a song about the {place2} for {hero}.
one day {his} {elder} sang a new song for {hero} and {friend}.

it went like this: "{song}."
this is the song: "{song}."

then {hero} sang it at the {place3}, where {fact3}.
then {hero} took the {ct} and sang it all the way to the {place3}.

the {job} heard it and sang along: "{song}."
soon all the children sang: "{song}."

when {petname} heard the song about the {song_thing}, it {sound}.
and {friend} liked the {song_thing} in the song, and {hero} liked the {song_pet}.
""")
PLOTS = (LOST, GIFT, SWAP, RACE, HIDE, BOXES, WALK, PICNIC, COUNT, ERRAND, SONG)
