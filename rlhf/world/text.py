"""Every sentence of the world: what customers ask and what replies can say."""

from __future__ import annotations

TOPICS = ("router", "kettle", "bicycle", "camera", "printer", "blender", "heater", "guitar")
INTENTS = ("refund", "delivery", "repair", "warranty")

DETAILS: dict[str, tuple[str, ...]] = {
    "refund": (
        "by bank transfer",
        "to your card",
        "as a voucher",
        "in cash",
        "by cheque",
        "through the app",
        "at the counter",
        "on your next bill",
    ),
    "delivery": (
        "in four days",
        "on Friday evening",
        "within one week",
        "tomorrow before lunch",
        "on Monday at noon",
        "after the holiday",
        "early on Sunday",
        "later today",
    ),
    "repair": (
        "near the museum",
        "at the harbour",
        "behind the library",
        "in the market hall",
        "next to the bakery",
        "opposite the theatre",
        "at the old mill",
        "beside the railway station",
    ),
    "warranty": (
        "six months",
        "three years",
        "eighteen months",
        "ten years",
        "two winters",
        "five seasons",
        "a whole lifetime",
        "ninety weeks",
    ),
}
"""Answer details per intent. The right one for `TOPICS[i]` is the i-th."""

FACTS: dict[str, tuple[str, ...]] = {
    "refund": (
        "The {topic} is refunded {detail}.",
        "We pay your money for the {topic} back {detail}.",
        "The refund for the {topic} is paid {detail}.",
    ),
    "delivery": (
        "The {topic} arrives {detail}.",
        "We will deliver the {topic} {detail}.",
        "Your {topic} will reach you {detail}.",
    ),
    "repair": (
        "The {topic} is repaired {detail}.",
        "We repair every {topic} {detail}.",
        "Our workshop will fix the {topic} {detail}.",
    ),
    "warranty": (
        "The warranty of the {topic} lasts {detail}.",
        "The {topic} has a warranty of {detail}.",
        "We cover the {topic} for {detail}.",
    ),
}
"""Phrasings of an answer."""

QUESTIONS: dict[str, tuple[str, ...]] = {
    "refund": (
        "How do I get my money back for the {topic}?",
        "How will you refund the {topic} that I returned?",
        "I sent the {topic} back, so how is it refunded?",
        "In which way do you pay the refund for my {topic}?",
        "Can you explain how the refund for the {topic} is paid?",
        "The {topic} was not right for me, how do I get a refund?",
    ),
    "delivery": (
        "When will my {topic} arrive?",
        "How long does the delivery of the {topic} take?",
        "I ordered a {topic}, when do you deliver it?",
        "When is the {topic} that I ordered delivered?",
        "Can you explain when the {topic} will reach me?",
        "My new {topic} is not here yet, when does it arrive?",
    ),
    "repair": (
        "Where can I have my {topic} repaired?",
        "My {topic} is broken, where do you repair it?",
        "Where do I bring the {topic} for a repair?",
        "The {topic} does not work, so where can you fix it?",
        "Can you explain where the {topic} is repaired?",
        "In which place does your team fix a broken {topic}?",
    ),
    "warranty": (
        "How long is the warranty of the {topic}?",
        "How long does the warranty of my {topic} last?",
        "For how long do you cover the {topic}?",
        "I bought a {topic}, so which warranty do I have?",
        "Can you explain how long the {topic} is covered?",
        "Is my {topic} still under warranty, and for how long?",
    ),
}
"""Question templates that training prompts use."""

NEW_QUESTIONS: dict[str, tuple[str, ...]] = {
    "refund": (
        "Please tell me how you pay my money back for the {topic}.",
        "I returned my {topic}, so how do you refund it?",
    ),
    "delivery": (
        "Please tell me when the delivery of my {topic} will arrive.",
        "I ordered the {topic} from you, how long does it take to arrive?",
    ),
    "repair": (
        "Please tell me where you repair a broken {topic}.",
        "I have a {topic} that does not work, where can I bring it?",
    ),
    "warranty": (
        "Please tell me how long my {topic} has a warranty.",
        "I have a new {topic}, how long does your warranty cover it?",
    ),
}
"""Question templates reserved for held-out prompts."""

GREETINGS = (
    "Hello, this is {name} from {city}.",
    "Hi, I am {name} from {city}.",
    "Good morning, {name} from {city} here.",
    "Dear team, my name is {name}, from {city}.",
    "Good evening, it is {name} in {city}.",
    "Hi there, {name} in {city} again.",
)
"""How training prompts begin."""

NEW_GREETINGS = (
    "Good morning, I am {name} in {city}.",
    "Dear team, this is {name} here, from {city}.",
)
"""How new-template prompts begin."""

REMARKS = (
    "I have one question.",
    "Sorry to bother you.",
    "I hope you are well.",
    "I like your little shop.",
    "Nobody answered my call.",
)
"""What some customers say between greeting and question."""

NAMES = (
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Emma",
    "Henry",
    "Jack",
    "Kate",
    "Leo",
    "Maria",
    "Nina",
    "Paul",
    "Rosa",
    "Sam",
    "Tom",
    "Vera",
)
CITIES = (
    "Bath",
    "Berlin",
    "Boston",
    "Cork",
    "Dublin",
    "Leeds",
    "London",
    "Lyon",
    "Madrid",
    "Oslo",
    "Oxford",
    "Paris",
    "Perth",
    "Rome",
    "Turin",
    "Vienna",
)

OPENINGS = (
    "Thank you for your message.",
    "Thanks a lot for asking us.",
    "It is good to hear from you.",
    "I am happy to help you.",
    "Welcome, and thanks for your patience.",
)
RUDE_OPENINGS = (
    "What do you want this time?",
    "You really should know this.",
    "Not another silly question from you.",
    "I am too busy for this.",
)
CLOSINGS = (
    "Have a lovely day.",
    "Kind regards from our team.",
    "We wish you all the best.",
    "Please write to us any time.",
    "Warm greetings from everyone at the shop.",
)
RUDE_CLOSINGS = (
    "Do not contact me again.",
    "Now leave us alone.",
    "That is your problem, not ours.",
    "Stop wasting my time.",
)
STEPS = (
    "Email us a photo of the receipt.",
    "Call us with your order number.",
    "Fill in the short form online.",
    "Show this code to the manager.",
    "Confirm your street and house number.",
    "Keep the box and the label ready.",
)
VAGUE_STEPS = (
    "Maybe something will happen at some point.",
    "Maybe somebody could look into it.",
    "Maybe just wait and see what comes up.",
    "Maybe there are things you can try.",
    "Maybe things will sort themselves out.",
)
FILLERS = (
    "Our company was founded by two brothers many decades ago.",
    "The weather has been rather strange in this part of the country.",
    "Many other people like to talk about such matters with their friends.",
    "As we often say, every story has a beginning and an end.",
)
EVASIONS = (
    "I cannot say anything about the {topic}.",
    "Nobody here knows much about the {topic}.",
    "It depends on what kind of {topic} you mean.",
)


def right_detail(topic: str, intent: str) -> str:
    """Return the detail that answers `intent` for `topic`."""
    return DETAILS[intent][TOPICS.index(topic)]


def templates(*, new: bool) -> tuple[str, ...]:
    """List the question templates of all intents: the reserved ones when `new`."""
    table = NEW_QUESTIONS if new else QUESTIONS
    return tuple(template for intent in INTENTS for template in table[intent])
