"""Which words does the synthetic support desk use: products, policy sentences, questions and requests?"""

from __future__ import annotations

PLANS = ("basic", "bronze", "silver", "gold", "family", "business")
STATUSES = ("active", "paused", "closed", "overdue")
PRODUCTS = (
    "laptops", "phones", "tablets", "cameras", "printers", "monitors", "keyboards", "speakers", "chairs", "desks",
    "lamps", "ovens", "fridges", "kettles", "bicycles", "helmets", "tents", "boots", "jackets", "watches", "rings",
    "guitars", "drums", "books", "toys", "pillows", "carpets", "drills",
)  # fmt: skip

# topic -> (article sentence, question phrasings); {p} is the product, {n} the value
POLICIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "refund": (
        "Refunds for {p} take {n} days.",
        (
            "How long do refunds for {p} take?",
            "When do I get my refund for {p}?",
            "How many days is a refund for {p}?",
        ),
    ),
    "warranty": (
        "The warranty for {p} lasts {n} months.",
        (
            "How long is the warranty for {p}?",
            "What warranty do {p} have?",
            "When does the warranty for {p} end?",
        ),
    ),
    "delivery": (
        "Delivery of {p} takes {n} days.",
        (
            "How long is the delivery of {p}?",
            "When is the delivery of my {p}?",
            "How fast is delivery of {p}?",
        ),
    ),
    "return": (
        "Returns are accepted for {p} within {n} days.",
        (
            "Until when are returns of {p} accepted?",
            "How long are returns of {p} possible?",
            "Are returns of {p} accepted?",
        ),
    ),
    "repair": (
        "Repairs of {p} cost {n} dollars.",
        (
            "How much do repairs of {p} cost?",
            "What do repairs of {p} cost?",
            "What is the price of repairs of {p}?",
        ),
    ),
    "restocking": (
        "The restocking fee for {p} is {n} percent.",
        (
            "What is the restocking fee for {p}?",
            "How high is the restocking fee for {p}?",
            "Is there a restocking fee for {p}?",
        ),
    ),
    "discount": (
        "Members get a discount on {p} of {n} percent.",
        (
            "What discount do members get on {p}?",
            "How high is the discount on {p}?",
            "Is there a discount on {p}?",
        ),
    ),
    "limit": (
        "The limit for {p} is {n} pieces.",
        (
            "What is the limit for {p}?",
            "How many {p} are the limit?",
            "Is there a limit for {p}?",
        ),
    ),
    "shipping": (
        "Shipping of {p} costs {n} dollars.",
        (
            "How much is shipping of {p}?",
            "What does shipping of {p} cost?",
            "What is the price of shipping {p}?",
        ),
    ),
    "installation": (
        "Installation of {p} costs {n} dollars.",
        (
            "How much is installation of {p}?",
            "What does installation of {p} cost?",
            "Is installation of {p} free?",
        ),
    ),
    "exchange": (
        "Exchanges are possible for {p} within {n} weeks.",
        (
            "How long are exchanges of {p} possible?",
            "Until when can I ask for exchanges of {p}?",
            "Are exchanges of {p} possible?",
        ),
    ),
    "support": (
        "Support for {p} answers within {n} hours.",
        (
            "How fast is support for {p}?",
            "When does support for {p} answer?",
            "How long do I wait for support for {p}?",
        ),
    ),
    "insurance": (
        "Insurance for {p} costs {n} dollars.",
        (
            "How much is insurance for {p}?",
            "What does insurance for {p} cost?",
            "Can I get insurance for {p}?",
        ),
    ),
    "trial": (
        "The trial of {p} lasts {n} days.",
        (
            "How long is the trial of {p}?",
            "When does the trial of {p} end?",
            "Is there a trial of {p}?",
        ),
    ),
}
TOPICS = tuple(POLICIES)

# account field -> (question phrasings, answer sentence); {a} is the account, {v} the field's value
ACCOUNT_FIELDS: dict[str, tuple[tuple[str, ...], str]] = {
    "plan": (
        (
            "What plan is account {a} on?",
            "Which plan does account {a} have?",
            "Tell me the plan of account {a}.",
        ),
        "Account {a} is on the {v} plan.",
    ),
    "status": (
        (
            "What is the status of account {a}?",
            "Is account {a} active?",
            "Tell me the status of account {a}.",
        ),
        "Account {a} is {v}.",
    ),
    "balance": (
        (
            "What is the balance of account {a}?",
            "How much does account {a} owe?",
            "Tell me the balance of account {a}.",
        ),
        "Account {a} owes {v} dollars.",
    ),
    "orders": (
        (
            "How many orders does account {a} have?",
            "How many orders are open for account {a}?",
            "Tell me the orders of account {a}.",
        ),
        "Account {a} has {v} open orders.",
    ),
}
# {t} is the ticket's topic
TICKET_REQUESTS = (
    "Please open a {t} ticket for account {a}.",
    "I need a {t} ticket, my account is {a}.",
    "Create a ticket about {t} for account {a}.",
    "Account {a} needs a {t} ticket.",
    "My {p} on account {a} need a {t} ticket.",
    "Open a ticket for account {a} about {t} of {p}.",
)
OPENINGS = ("", "", "", "Hello. ", "Hi, ", "Good morning. ", "Please help. ", "A question: ")
ASIDES = ("My account is {a}. ", "I am on account {a}. ", "This is account {a}. ")
