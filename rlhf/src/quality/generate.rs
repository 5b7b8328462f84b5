//! Clean rows for tests: varied prompts, a better and a worse answer that differ in content and not in length, side, or markup.

use crate::{
    dataset::{Example, Message, Origin, Position, Row},
    random::Random,
};

const THINGS: &str = "harbour lantern orchard compiler violin glacier bakery telescope contract bicycle reservoir ledger beehive router \
    novel vaccine bridge garden satellite kettle archive turbine recipe passport piano quarry sensor theatre umbrella vineyard workshop \
    aquarium battery calendar database elevator furnace greenhouse helmet index journal kitchen library mortgage notebook oven pipeline \
    queue railway server tunnel unit valley warehouse yard zipper anchor budget canal dashboard engine festival grammar hospital invoice \
    jacket keyboard loom market nursery orchestra printer quilt radiator school tariff upgrade vessel window antenna basket cellar dome";
const QUALITIES: &str = "narrow modern quiet damaged expensive seasonal portable ancient crowded reliable fragile heated shared wooden \
    municipal remote encrypted temporary foreign circular abandoned certified distributed floating insulated magnetic neglected obsolete \
    painted rented silent tidal underground vintage waterproof annual borrowed copper digital electric";
const ACTIONS: &str = "repair move insure replace measure design test clean rent document automate extend paint inspect calibrate migrate \
    protect simplify ventilate restore schedule translate publish compare register improve cool connect finance label monitor prune \
    recycle secure store tune upgrade validate weigh assemble";
const PLACES: &str = "Lisbon Tallinn Quito Nairobi Oslo Kyoto Bremen Cusco Galway Hanoi Izmir Jaipur Krakow Lyon Malmo Naples Ottawa \
    Porto Riga Sofia Turin Utrecht Varna Wellington Zagreb";

const CONTEXTS: [&str; 12] = [
    "Our team in {place} looks after a {quality} {thing} next to the {thing}.",
    "I inherited a {quality} {thing} and I have never had to {action} one before.",
    "We bought a {thing} from a seller in {place}, and the {quality} {thing} came with it.",
    "My neighbour says that a {quality} {thing} ruins every {thing}.",
    "For a course in {place} I am writing about the {quality} {thing}.",
    "Last winter the {thing} failed while we tried to {action} the {thing}.",
    "There is a {quality} {thing} in the basement of the {thing}.",
    "The landlord wants us to {action} the {thing} before spring.",
    "I only have one weekend and a {quality} {thing}.",
    "Yesterday somebody asked me to {action} a {thing} in {place}.",
    "Between the {thing} and the {thing} we lose about two hours a day.",
    "Nobody here knows who used to {action} the {quality} {thing}.",
];
const QUESTIONS: [&str; 12] = [
    "How would you {action} a {quality} {thing} without touching the {thing}?",
    "What does it cost to {action} the {thing} and {action} the {thing} in {place}?",
    "Which is better, a {quality} {thing} or a {quality} {thing}?",
    "Can you explain why a {thing} needs a {quality} {thing}?",
    "Please write a short plan to {action} the {thing} and the {quality} {thing}.",
    "Who should {action} the {thing}, and when should they {action} the {thing}?",
    "Give me three reasons to {action} a {quality} {thing} in {place}.",
    "What goes wrong when people {action} a {thing} beside a {quality} {thing}?",
    "Is there a safe way to {action} both the {thing} and the {thing}?",
    "Draft a letter that asks {place} to {action} the {quality} {thing}.",
    "How long does a {quality} {thing} last after you {action} its {thing}?",
    "Compare the {thing} in {place} with the {quality} {thing} that we have.",
];
const GOOD: [&str; 14] = [
    "Start with the {thing}, because a {quality} one fails first when you {action} it.",
    "Measure the {thing} twice, then {action} the {quality} part and write both values down.",
    "In {place} this takes two days: one to {action} the {thing}, one to let the {thing} settle.",
    "A concrete example is the {quality} {thing} in {place}, which they chose to {action} in stages.",
    "The main risk is the {thing}; keep it apart from anything {quality} until you {action} it.",
    "Specifically, {action} the {thing} before the {thing}, since the second depends on the first.",
    "That costs less than a new {thing}, as long as the {quality} {thing} still holds.",
    "Check the {thing} after each step, so that you can {action} the {quality} one again if needed.",
    "If the {thing} is {quality}, stop there and {action} the {thing} with a second person.",
    "The reason is simple: the {quality} {thing} carries the load that the {thing} cannot.",
    "Compare it with the {thing} from {place}, whose {quality} frame people {action} every spring.",
    "Finally, {action} what is left of the {thing} and note the date beside the {quality} {thing}.",
    "Two numbers decide this, namely the age of the {thing} and how {quality} the {thing} is.",
    "Ask the office in {place} first, because they must approve it when you {action} a {thing}.",
];
const POOR: [&str; 14] = [
    "Well, a {thing} is a {thing}, and people often {action} such things somehow or other.",
    "It depends on many factors, and the {quality} {thing} might perhaps matter or not.",
    "Some say that in {place} everybody would {action} it, but honestly who can tell.",
    "You could maybe {action} the {thing}, or you could possibly leave the {quality} {thing} alone.",
    "There are lots of opinions about the {thing}, and all of them are kind of {quality}.",
    "Basically it is what it is, so just {action} whatever {quality} {thing} you like.",
    "As everybody knows, things like a {thing} in {place} are generally rather {quality}.",
    "I guess the {thing} is fine, although one never really knows with a {quality} {thing}.",
    "Anyway, the {thing} is interesting, and so are the {thing} and the {quality} {thing}.",
    "Sure, you can {action} it, whatever, as stuff like the {thing} usually sorts itself out.",
    "In general it is good to {action} good things and to avoid a bad {quality} {thing}.",
    "Hard to say, but a {thing} from {place} would probably be sort of {quality} too.",
    "Just do something with the {thing} and hope that the {quality} {thing} works out.",
    "That said, who cares about the {thing} when there is also a {quality} {thing} somewhere.",
];

/// A message of plain text.
pub(super) fn message(role: &str, content: impl Into<String>) -> Message {
    Message { role: role.to_owned(), content: content.into(), extra: Default::default() }
}

/// Preferences that every check finds in order.
pub(super) fn clean(count: usize, seed: u64) -> Vec<Row> {
    let mut writer = Writer::new(seed);
    (0..count).map(|number| writer.row(number)).collect()
}

/// The prompts of clean rows, as evaluations or live traffic have them.
pub(super) fn prompts(count: usize, seed: u64) -> Vec<Vec<Message>> {
    clean(count, seed).iter().map(|row| row.example.prompt().to_vec()).collect()
}

/// The row with one word of its prompt and none of its answers changed.
pub(super) fn reword_prompt(row: &Row) -> Row {
    let mut row = row.clone();
    let Example::Preference { prompt, chosen, rejected } = &mut row.example else { panic!("not a preference") };
    let last = prompt.last_mut().unwrap();
    let mut words: Vec<&str> = last.content.split(' ').collect();
    let middle = words.len() / 2;
    words[middle] = "actually";
    last.content = words.join(" ");
    let example = Example::Preference { prompt: prompt.clone(), chosen: chosen.clone(), rejected: rejected.clone() };
    Row::new(example, row.origin)
}

/// The row with its answers replaced by what the function makes of (chosen, rejected).
pub(super) fn with_answers(row: &Row, edit: impl FnOnce(&str, &str) -> (String, String)) -> Row {
    let Example::Preference { prompt, chosen, rejected } = &row.example else { panic!("not a preference") };
    let (chosen, rejected) = edit(&chosen[0].content, &rejected[0].content);
    let answer = |text| vec![message("assistant", text)];
    let example = Example::Preference { prompt: prompt.clone(), chosen: answer(chosen), rejected: answer(rejected) };
    Row::new(example, row.origin.clone())
}

/// The row with the text of its last prompt message edited.
pub(super) fn with_prompt(row: &Row, edit: impl FnOnce(&str) -> String) -> Row {
    let mut example = row.example.clone();
    let (Example::Preference { prompt, .. } | Example::Unpaired { prompt, .. } | Example::Demonstration { prompt, .. }) =
        &mut example;
    let last = prompt.last_mut().unwrap();
    last.content = edit(&last.content);
    Row::new(example, row.origin.clone())
}

/// The row with the opposite preference.
pub(super) fn flipped(row: &Row) -> Row {
    with_answers(row, |chosen, rejected| (rejected.to_owned(), chosen.to_owned()))
}

/// Draws sentences.
struct Writer {
    random: Random,
    things: Vec<&'static str>,
    qualities: Vec<&'static str>,
    actions: Vec<&'static str>,
    places: Vec<&'static str>,
}

impl Writer {
    fn new(seed: u64) -> Self {
        let list = |words: &'static str| words.split_whitespace().collect();
        let (things, qualities, actions, places) = (list(THINGS), list(QUALITIES), list(ACTIONS), list(PLACES));
        Self { random: Random::new(seed), things, qualities, actions, places }
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.random.below(from.len())]
    }

    fn sentence(&mut self, templates: &[&str]) -> String {
        let template = self.pick(templates);
        let mut text = String::new();
        let mut rest = template;
        while let Some((before, after)) = rest.split_once('{') {
            let (slot, after) = after.split_once('}').unwrap();
            let index = |list: &[&'static str], random: &mut Random| list[random.below(list.len())];
            text += before;
            text += match slot {
                "thing" => index(&self.things, &mut self.random),
                "quality" => index(&self.qualities, &mut self.random),
                "action" => index(&self.actions, &mut self.random),
                _ => index(&self.places, &mut self.random),
            };
            rest = after;
        }
        text + rest
    }

    fn answer(&mut self, templates: &[&str]) -> String {
        let sentences = 3 + self.random.below(7);
        let lines: Vec<String> = (0..sentences).map(|_| self.sentence(templates)).collect();
        match self.random.below(5) {
            0 => lines.iter().map(|line| format!("- {line}")).collect::<Vec<_>>().join("\n"),
            1 => lines.join("\n\n"),
            _ => lines.join(" "),
        }
    }

    fn row(&mut self, number: usize) -> Row {
        let contexts = 1 + self.random.below(2);
        let mut sentences: Vec<String> = (0..contexts).map(|_| self.sentence(&CONTEXTS)).collect();
        sentences.push(self.sentence(&QUESTIONS));
        let mut prompt = vec![message("system", "You are a helpful assistant who answers questions about everyday engineering.")];
        prompt.push(message("user", sentences.join(" ")));
        let chosen = vec![message("assistant", self.answer(&GOOD))];
        let rejected = vec![message("assistant", self.answer(&POOR))];
        let origin = Origin {
            raters: vec![format!("rater{}", self.random.below(12))],
            users: vec![format!("user{}", self.random.below(40))],
            source: "comparison".to_owned(),
            chosen_position: Some(self.pick(&[Position::Left, Position::Right])),
            judged_at: number as i64,
            ..Origin::default()
        };
        Row::new(Example::Preference { prompt, chosen, rejected }, origin)
    }
}
