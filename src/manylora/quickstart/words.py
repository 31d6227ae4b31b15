"""The word list of the quickstart holds common English nouns by category.

The base model `seedling` was pretrained on skills over exactly these words, so the list is
data that model and tasks share: change it only together with a new pretraining.
"""

CATEGORIES: dict[str, str] = {
    "animal": """
        cat dog horse cow sheep goat pig rabbit mouse tiger lion bear wolf fox deer monkey zebra
        camel donkey otter beaver badger hamster panda koala kitten puppy lizard snake turtle frog
        toad whale dolphin seal shark crab lobster spider beetle ant moth wasp snail gorilla hyena
        jackal leopard giraffe mole salmon trout worm pony lamb calf weasel squid""",
    "bird": """
        robin eagle hawk owl swan duck goose crow raven parrot pigeon sparrow falcon heron stork
        turkey penguin ostrich pelican magpie finch canary cuckoo puffin condor toucan wren dove
        peacock vulture""",
    "food": """
        bread cheese butter soup rice pasta pizza cake cookie pie honey sugar salt pepper egg bacon
        sausage burger noodle pancake waffle salad sauce jam toast steak cereal onion carrot potato
        tomato cabbage spinach garlic bean pea corn radish pumpkin mustard pudding muffin biscuit
        cracker yogurt ham""",
    "fruit": """
        apple banana cherry grape lemon mango melon orange peach pear plum olive lime fig kiwi
        papaya apricot coconut quince guava raisin""",
    "plant": """
        rose tulip daisy lily oak pine maple willow fern moss ivy grass clover cactus bamboo birch
        cedar elm poppy violet lotus thistle nettle orchid heather acorn seed bush tree flower""",
    "place": """
        garden park school house castle village city farm beach forest island market museum library
        church temple tower bridge harbor station airport hotel kitchen office palace prison
        theater valley desert mountain river lake meadow canyon street bakery garage cellar attic
        hospital stadium cottage cabin town country jungle cave swamp pond hill""",
    "tool": """
        hammer saw drill wrench shovel rake broom ladder chisel pliers spade axe needle knife brush
        bucket rope nail screw file pencil eraser ruler scissors tape glue anvil lever pulley wheel
        compass lantern candle torch clock magnet mirror kettle funnel sponge""",
    "color": """
        red blue green yellow purple pink brown black white gray scarlet crimson amber indigo
        magenta maroon beige ivory turquoise""",
    "body": """
        head arm leg hand foot knee elbow finger thumb shoulder neck nose mouth ear eye chin cheek
        tongue tooth stomach heart lung liver brain ankle wrist hip skin bone muscle""",
    "clothing": """
        shirt hat coat scarf glove sock shoe boot belt dress skirt jacket sweater trousers vest cap
        hood apron sandal slipper pajamas uniform button pocket collar sleeve ribbon mitten""",
    "vehicle": """
        car bus train truck plane boat ship bicycle wagon tractor rocket ferry canoe tram taxi van
        scooter sled kayak yacht balloon glider tanker cart raft submarine""",
    "weather": """
        rain snow wind storm cloud fog hail frost thunder sunshine breeze mist drizzle blizzard
        tornado rainbow lightning""",
    "job": """
        doctor teacher farmer baker nurse pilot sailor soldier painter writer singer dancer lawyer
        judge waiter butcher plumber miner hunter actor banker barber carpenter chef clerk engineer
        firefighter gardener mayor priest tailor poet potter weaver""",
    "furniture": """
        table chair bed sofa desk lamp shelf couch stool bench drawer cupboard wardrobe carpet
        curtain pillow blanket mattress cradle bookcase cabinet""",
    "instrument": """
        piano guitar violin drum flute trumpet harp cello banjo organ clarinet trombone fiddle
        tuba bugle oboe lute cymbal""",
    "drink": """
        water milk tea coffee juice wine beer cocoa lemonade cider soda""",
    "metal": """
        iron gold silver copper tin lead zinc steel brass bronze nickel platinum""",
    "family": """
        mother father sister brother uncle aunt cousin son daughter baby parent grandma grandpa
        nephew niece husband wife""",
    "toy": """
        doll kite ball puzzle marble robot teddy yoyo puppet swing rattle spinner""",
    "shape": """
        circle square triangle oval cube sphere cone star spiral diamond cylinder arrow""",
}


def _index() -> dict[str, str]:
    """Map every word to its category; a word in two categories is a mistake in the list."""
    index: dict[str, str] = {}
    for category, text in CATEGORIES.items():
        for word in text.split():
            if word in index:
                raise ValueError(f"{word!r} is listed twice")
            index[word] = category
    return index


CATEGORY_OF: dict[str, str] = {w: c for w, c in _index().items() if 3 <= len(w) <= 8}
WORDS: tuple[str, ...] = tuple(sorted(CATEGORY_OF))
