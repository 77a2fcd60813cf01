"""Which nouns an object could also be called, so that "Is this a sofa?" is not answered No about an armchair."""

from __future__ import annotations

from functools import cache

from pointalign.embedded.facts import singular

# Nouns and words of names. Two words of one group do not clearly exclude each other. A group that is too large only
# forbids some questions, so doubtful words are in.
GROUPS = [
    group.split()
    for group in (
        "chair armchair seat stool bench sofa couch lounge lounger bed crib stroller ottoman futon beanbag potty "
        "toilet hammock bidet swing wheelchair mattress",
        "bed crib futon sofa lounger mattress hammock mat bathmat bag beanbag",
        "table desk stand bench workbench vanity stool island cooktop ottoman extension tray counter console "
        "dresser setting chessboard",
        "lamp light lantern spotlight flashlight lamppost candle chandelier projector",
        "tree plant bush hedge flower cactus lily orchid tulip log vase pot fern palm bamboo",
        "bottle jar vase shaker pot extinguisher glass cup mug bowl kettle teapot creamer pan barrel dispenser "
        "container fryer basin tub ashtray plate tray bin can basket holder cooker squeezer",
        "car truck van bus forklift train limousine toy",
        "bicycle bike motorcycle scooter tricycle skateboard",
        "mower wheelbarrow stroller tricycle scooter wheelchair treadmill",
        "door window cabinet wardrobe cupboard closet locker elevator stall refrigerator freezer shutter blind "
        "frame screen curtain gate",
        "cabinet cupboard wardrobe closet locker dresser chest bookcase shelf rack stand unit vanity box safe "
        "refrigerator freezer island counter desk trunk console stove oven sideboard drawer",
        "box cabinet chest trunk container crate carton case bin basket locker safe cube briefcase suitcase "
        "mailbox pallet barrel package playhouse doghouse dollhouse",
        "can dustbin bin basket barrel container bucket",
        "bag handbag backpack briefcase suitcase case beanbag basket",
        "washbasin sink basin bathtub tub urinal bidet toilet bowl vanity pool fountain faucet counter shower",
        "stove oven cooker cooktop microwave grill fireplace heater hood chimney fryer toaster maker machine "
        "brewer range",
        "radiator heater conditioner fan cooler dryer fireplace hood detector towel rail rack",
        "machine maker brewer mixer blender grinder press squeezer cooker fryer toaster kettle processor printer "
        "dryer mower treadmill dispenser drill player console unit cooler conditioner mill",
        "television screen computer laptop tablet phone keyboard radio stereo speaker amplifier player console "
        "projector printer controller control intercom camera detector doorbell thermometer dock calculator "
        "monitor unit",
        "switch socket intercom detector doorbell thermometer controller control lock plug dock",
        "clock watch thermometer scale dartboard calendar",
        "towel mat rug carpet doormat bathmat curtain blind clothes skirt sponge",
        "jacket dress trousers shorts skirt clothes sock glove hanger",
        "shoe slipper sneaker moccasin boot sock",
        "hat cap helmet",
        "glasses sunglasses glass",
        "man woman boy girl mannequin doll snowman person child player statue",
        "horse dog cat rabbit chicken bear deer doll toy",
        "bread hamburger cupcake cake dog steak fries butter apple chicken sandwich burger food soap",
        "pencil marker pen ruler lipstick",
        "hammer screwdriver pliers saw drill shovel broom brush comb scissors knife tape ruler measure tool",
        "knife fork spoon utensil paddle spatula shaker grinder mill cutlery",
        "hut tent house playhouse doghouse dollhouse shed stall playground marquee",
        "board chessboard whiteboard dartboard keyboard skateboard sign screen puzzle frame picture painting tablet",
        "book newspaper calendar card banknote puzzle frame picture phone tablet",
        "railing rail fence hedge staircase ladder stairs escalator gate barrier track",
        "ball basketball balloon",
        "racket paddle bat",
        "goal hoop net swing",
        "swing seesaw slide playground trampoline sandpit",
        "arrow crossing sidewalk sign road parking space",
        "column tower chimney lamppost hydrant cone pole post barrel",
        "dock pallet bridge",
        "hanger holder rack stand hook rail shelf",
        "head faucet sprayer shower",
        "reel hose tape",
        "mailbox intercom locker",
        "aquarium pool tub sandpit",
        "stand holder dispenser tray",
        "rock stone",
        "rowboat boat kayak canoe",
        "biplane airplane plane",
    )
]


@cache
def similar_words(noun: str) -> frozenset[str]:
    """The words of a noun and of every group that holds its last word."""
    words = noun.split()
    return frozenset(words).union(*(group for group in GROUPS if words[-1] in group))


@cache
def could_be(name: str, head_noun: str, noun: str) -> bool:
    """Whether "Is this a `noun`?" is right or debatable for an object of this name and head noun.

    It is where the name or head noun holds a word of a group of the noun, or where a word of one holds the other:
    "dollhouse" and "house", "armchair" and "chair".
    """
    words = set(name.lower().split()) | set(head_noun.split())
    words |= {singular(word) for word in words}
    if words & similar_words(noun):
        return True
    last = noun.split()[-1]
    return any(last in word or (word in last and len(word) > 2) for word in words)
