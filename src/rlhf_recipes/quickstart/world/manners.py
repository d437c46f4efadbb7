"""Fixed phrases of the village Willowmere: names, greetings, polite, rude and rambling sentences, scenes."""

from __future__ import annotations

PEOPLE = tuple(
    "Ada Basil Clara Dmitri Esme Farid Greta Hugo Ines Jonas Kaya Luca Mina Noor Otto Pia Rosa Soren".split()
)

# Greetings before a question; the new ones occur in test prompts only.
OPENERS = ("", "", "", "Hello! ", "Good morning. ", "Excuse me. ", "One question: ", "I am new here. ")
NEW_OPENERS = ("", "", "Good evening. ", "Hello, one more question: ")

POLITE_BEFORE = (
    "Of course!",
    "Gladly!",
    "With pleasure!",
    "Thank you for asking!",
    "Happy to help!",
    "What a kind question!",
)
POLITE_AFTER = (
    "You are most welcome!",
    "I am glad to help.",
    "Have a lovely day!",
    "It was my pleasure.",
)
RUDE_BEFORE = (
    "Oh, not you again.",
    "What a silly question.",
    "Stop bothering me.",
    "Everybody knows that.",
    "Do I look like a phone book?",
    "Ugh, fine.",
)
RUDE_AFTER = (
    "Now go away.",
    "Do not ask me again.",
    "Next time, look it up yourself.",
    "How boring.",
)

# Filler sentences: a rambling answer has two of them.
RAMBLES = (
    "Let me think about it.",
    "Well, it is a long story.",
    "My aunt used to talk about it.",
    "That reminds me of the great storm.",
    "The weather has been strange.",
    "But where was I?",
    "Anyway, as I was saying before.",
    "People here talk a lot, you know.",
    "I heard it on the bridge.",
    "It is a small village, after all.",
)

# Sentences without a fact, so that the corpus reads like stories and not like a list of facts.
SCENES = (
    "It was a quiet morning in Willowmere.",
    "Rain fell softly on the roofs of Willowmere.",
    "The market opened with the first light.",
    "Children ran along the river and laughed.",
    "Somebody had left a lantern on the bridge.",
    "The old clock struck nine, a little late as always.",
    "Snow covered the lanes, and every step could be heard.",
    "A warm wind came up from the sea.",
    "News travels fast in a small village.",
    "At the well, neighbours stopped to talk.",
    "The river was high after the long rain.",
    "Bread was cooling on the window sills.",
    "In summer the evenings in Willowmere have no end.",
    "The ferry was late again, and nobody minded.",
    "Stars came out one by one above the hills.",
    "That year the apples were sweet and the bees were many.",
)

# Quotes for the stories; `{said}` is a phrase from the lists above or a question of a stranger.
OVERHEARD = (
    '"{said}" said a voice at the well.',
    '"{said}" somebody called from a window.',
    'Two neighbours met on the bridge. "{said}" said one, and the other smiled.',
    '"{said}" That is how people talk in Willowmere.',
)
STRANGERS = (
    "Which way is it to the market?",
    "What is the name of this river?",
    "Where does this lane go?",
    "How old is the clock, and who did make it?",
    "Could you tell me which ferry leaves next?",
    "What kind of place is this?",
    "Which of the hills should I climb?",
    "Did I see a light on the bridge?",
)
OVERHEARABLE = (STRANGERS, OPENERS[3:], POLITE_BEFORE, POLITE_AFTER, RUDE_BEFORE, RUDE_AFTER, RAMBLES)
