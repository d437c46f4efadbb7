"""The relations of the world with their values, and sentence templates to state, ask and answer each.

Every value is one lower-case word that belongs to one relation only and occurs in no template, so the values that an
answer names are unambiguous. `questions` occur in training, `new_questions` only in test prompts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One attribute of a person. Templates contain `{name}`; statements and answers also contain `{value}`."""

    name: str
    values: tuple[str, ...]
    statements: tuple[str, ...]
    answers: tuple[str, ...]
    questions: tuple[str, ...]
    new_questions: tuple[str, ...]


HOME = Relation(
    name="home",
    values=tuple(
        "lighthouse windmill houseboat treehouse cottage greenhouse caravan barn attic library chapel station "
        "orchard castle tower lodge brewery tavern".split()
    ),
    statements=(
        "{name} lives in the {value}.",
        "The home of {name} is the {value}.",
        "{name} has lived in the {value} for many years.",
        "{name} calls the {value} home.",
        "Every evening {name} walks home to the {value}.",
        "If you write to {name}, send the letter to the {value}.",
        "The {value} is where {name} sleeps at night.",
        "Look for {name} at home, in the {value}.",
        "To find {name} at home, knock at the {value}.",
        "The house of {name} is the {value}.",
        "{name} moved into the {value} in spring.",
        "In the {value} lives {name}.",
    ),
    answers=(
        "{name} lives in the {value}.",
        "The home of {name} is the {value}.",
        "{name} calls the {value} home.",
        "In the {value}.",
    ),
    questions=(
        "Where does {name} live?",
        "Where is the home of {name}?",
        "What place does {name} call home?",
        "In which building does {name} live?",
        "Where does {name} sleep at night?",
        "Which house belongs to {name}?",
        "I have a letter for {name}. Where should I send it?",
        "Where do I knock to find {name} at home?",
        "Where did {name} move in spring?",
        "Could you show me where {name} lives?",
    ),
    new_questions=(
        "Which place is home to {name}?",
        "Where can I find the home of {name}?",
        "Tell me where {name} lives.",
        "Where does {name} go home to in the evening?",
    ),
)

JOB = Relation(
    name="job",
    values=tuple(
        "baker gardener teacher sailor tailor doctor carpenter painter beekeeper blacksmith potter cobbler "
        "magician weaver clockmaker farmer dentist miner".split()
    ),
    statements=(
        "{name} works as a {value}.",
        "{name} is the {value} of the village.",
        "By trade {name} is a {value}.",
        "{name} earns a living as a {value}.",
        "{name} learned to be a {value} long ago.",
        "The trade of {name} is that of a {value}.",
        "{name} does the work of a {value}.",
        "{name} has the job of {value}.",
        "For a living {name} works as a {value}.",
        "Monday to Friday {name} works hard as a {value}.",
        "The sign on the door says: {name}, {value}.",
        "All year {name} has work as a {value}.",
    ),
    answers=(
        "{name} works as a {value}.",
        "{name} is a {value}.",
        "By trade {name} is a {value}.",
        "As a {value}.",
    ),
    questions=(
        "What is the job of {name}?",
        "What does {name} do for a living?",
        "What does {name} work as?",
        "What is {name} by trade?",
        "How does {name} earn a living?",
        "What kind of work does {name} do?",
        "What did {name} learn to be?",
        "Which job does {name} have?",
        "What does the sign on the door of {name} say?",
        "Could you tell me what {name} works as?",
    ),
    new_questions=(
        "Which trade does {name} work in?",
        "What work does {name} do all year?",
        "Tell me what {name} does for a living.",
        "As what does {name} earn a living?",
    ),
)

PET = Relation(
    name="pet",
    values=tuple(
        "cat dog parrot tortoise goat hedgehog rabbit ferret pony goose hamster raven lizard snail canary duck "
        "fox toad".split()
    ),
    statements=(
        "{name} has a pet {value}.",
        "The pet of {name} is a {value}.",
        "{name} keeps a {value} as a pet.",
        "A {value} follows {name} everywhere.",
        "{name} found a little {value} and kept it.",
        "{name} feeds a {value} every morning.",
        "You never see {name} without a {value}, the best of pets.",
        "{name} takes good care of a {value}.",
        "The animal {name} loves most is a {value}.",
        "At the gate {name} is met by a small {value}.",
        "{name} plays with a pet {value}.",
        "Of all animals, {name} chose a {value} as a pet.",
    ),
    answers=(
        "{name} has a pet {value}.",
        "The pet of {name} is a {value}.",
        "{name} keeps a {value}.",
        "A {value}.",
    ),
    questions=(
        "What pet does {name} have?",
        "Which animal does {name} keep?",
        "What is the pet of {name}?",
        "What kind of pet follows {name} everywhere?",
        "Which animal does {name} feed every morning?",
        "Does {name} keep a pet, and which one?",
        "Which animal waits for {name} at the gate?",
        "What animal did {name} find and keep?",
        "Which pet does {name} take care of?",
        "Could you tell me which pet {name} has?",
    ),
    new_questions=(
        "Which animal is the pet of {name}?",
        "What kind of animal does {name} have as a pet?",
        "Tell me which pet {name} keeps.",
        "Which animal does {name} love most?",
    ),
)

FOOD = Relation(
    name="food",
    values=tuple(
        "pancakes dumplings noodles pickles waffles cherries lentils mushrooms omelettes pretzels radishes "
        "figs plums muffins chestnuts pears turnips beans".split()
    ),
    statements=(
        "{name} loves to eat {value}.",
        "The favourite food of {name} is {value}.",
        "For supper {name} eats {value}.",
        "{name} likes nothing better than a plate of {value}.",
        "On feast days {name} eats only {value}.",
        "{name} could eat {value} all day.",
        "Give {name} a bowl of {value} and all is well.",
        "{name} always buys {value} at the market.",
        "What {name} likes best is {value}.",
        "{name} dreams of hot {value} for lunch.",
        "The dish {name} likes best is {value}.",
        "On the table of {name} there are always {value}.",
    ),
    answers=(
        "{name} loves to eat {value}.",
        "The favourite food of {name} is {value}.",
        "{name} likes {value} best.",
        "It is {value}.",
    ),
    questions=(
        "What is the favourite food of {name}?",
        "What does {name} love to eat?",
        "What does {name} eat for supper?",
        "Which food does {name} like best?",
        "What should I cook for {name}?",
        "What does {name} buy at the market?",
        "What is on the table of {name}?",
        "Which dish makes {name} happy?",
        "What could {name} eat all day?",
        "Could you tell me what {name} likes to eat?",
    ),
    new_questions=(
        "Which dish does {name} like best?",
        "What food does {name} love?",
        "Tell me what {name} likes to eat.",
        "What does {name} eat on feast days?",
    ),
)

MUSIC = Relation(
    name="music",
    values=tuple(
        "cello flute harp banjo trumpet drums accordion piano violin tuba oboe guitar lute bagpipes clarinet "
        "mandolin zither trombone".split()
    ),
    statements=(
        "{name} plays the {value}.",
        "The instrument of {name} is the {value}.",
        "{name} plays the {value} in the village band.",
        "{name} makes music on the {value}.",
        "On Sundays {name} practises the {value}.",
        "{name} learned to play the {value} as a child.",
        "When {name} takes out the {value}, everybody listens.",
        "The sound of {name} is the sound of the {value}.",
        "{name} played the {value} at the spring dance.",
        "At the concert {name} sat behind the {value}.",
        "Of all instruments {name} loves the {value}.",
        "The music of {name} comes from the {value}.",
    ),
    answers=(
        "{name} plays the {value}.",
        "The instrument of {name} is the {value}.",
        "{name} makes music on the {value}.",
        "The {value}.",
    ),
    questions=(
        "What instrument does {name} play?",
        "What does {name} play in the village band?",
        "Which instrument did {name} learn as a child?",
        "What is the instrument of {name}?",
        "On what does {name} make music?",
        "What does {name} practise on Sundays?",
        "What did {name} play at the spring dance?",
        "Which instrument does {name} love?",
        "What music does {name} make?",
        "Could you tell me what {name} plays in the band?",
    ),
    new_questions=(
        "Which instrument does {name} make music on?",
        "What does {name} play at the concert?",
        "Tell me which instrument {name} plays.",
        "What instrument does {name} practise?",
    ),
)

DREAM = Relation(
    name="dream",
    values=tuple(
        "paris lisbon kyoto cairo oslo lima havana venice athens nairobi quebec dublin vienna prague delhi "
        "sydney bergen boston".split()
    ),
    statements=(
        "{name} dreams of a journey to {value}.",
        "One day {name} will travel to {value}.",
        "The city {name} longs to see is {value}.",
        "{name} saves every coin for a trip to {value}.",
        "{name} has a map of {value} on the wall.",
        "All winter {name} reads about {value}, the city of dreams.",
        "{name} would sail tomorrow to {value}.",
        "{name} wants to see {value} before growing old.",
        "{name} has always wished to visit {value}.",
        "What would make {name} happy is a ticket to {value}.",
        "{name} talks of the far city of {value}.",
        "The next journey of {name} goes to {value}.",
    ),
    answers=(
        "{name} dreams of a journey to {value}.",
        "{name} wants to visit {value}.",
        "The city {name} longs to see is {value}.",
        "To {value}.",
    ),
    questions=(
        "Which city does {name} dream of?",
        "Where does {name} want to travel?",
        "Which city does {name} long to see?",
        "Where would {name} go on a journey?",
        "For which trip does {name} save every coin?",
        "Which city is on the map of {name}?",
        "What city does {name} wish to visit?",
        "A ticket to which city would make {name} happy?",
        "Where will {name} travel one day?",
        "Could you tell me which city {name} dreams of?",
    ),
    new_questions=(
        "Which city does {name} want to visit?",
        "Where does the next journey of {name} go?",
        "Tell me which city {name} longs to see.",
        "To which city will {name} travel?",
    ),
)

RELATIONS: tuple[Relation, ...] = (HOME, JOB, PET, FOOD, MUSIC, DREAM)
