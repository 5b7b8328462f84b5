//! Finding a marker in a text that is still coming.

/// White space directly before a marker that is dropped with it, at most: what is held back must be bounded.
const DROPPED_SPACE: usize = 64;

/// Where the first marker of a text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A marker: text up to `text` comes before it, what follows it begins at `after`.
    Marker {
        /// End of the text before, without white space.
        text: usize,
        /// Where the marker itself begins.
        start: usize,
        /// Behind the marker.
        after: usize,
    },
    /// None so far: text up to here is certain, the rest may be the start of one.
    Certain(usize),
}

/// Looks for the first of `markers` in `text`; `last`: no more text will come.
pub(super) fn find(text: &str, markers: &[&str], last: bool) -> Found {
    let at = |marker: &&str| Some((text.find(*marker)?, marker.len()));
    // The longer of two that begin at one place.
    let first = markers.iter().filter_map(at).min_by_key(|&(start, length)| (start, usize::MAX - length));
    let possible = if last { None } else { possible_start(text, markers) };
    match first {
        // A longer marker may still come to be at the same place or before.
        Some((start, length)) if possible.is_none_or(|possible| possible > start) => {
            Found::Marker { text: space_before(text, start), start, after: start + length }
        }
        _ if last => Found::Certain(text.len()),
        _ => Found::Certain(space_before(text, possible.unwrap_or(text.len()))),
    }
}

/// Where the longest end of `text` begins that a marker begins with and does not end with.
fn possible_start(text: &str, markers: &[&str]) -> Option<usize> {
    let longest = markers.iter().map(|marker| marker.len()).max().unwrap_or(0);
    let from = text.len().saturating_sub(longest.saturating_sub(1));
    let ends = (from..text.len()).filter(|&start| text.is_char_boundary(start));
    let is_start = |start: &usize| {
        let end = &text[*start..];
        markers.iter().any(|marker| marker.len() > end.len() && marker.starts_with(end))
    };
    ends.into_iter().find(is_start)
}

/// Where the white space before `end` begins.
fn space_before(text: &str, end: usize) -> usize {
    let mut start = text[..end].trim_end().len();
    if end - start > DROPPED_SPACE {
        start = end - DROPPED_SPACE;
        while !text.is_char_boundary(start) {
            start += 1;
        }
    }
    start
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARKERS: &[&str] = &["<call>", "[X]"];

    #[test]
    fn a_marker_takes_the_space_before_it_along() {
        assert_eq!(find("ab \n<call> c", MARKERS, false), Found::Marker { text: 2, start: 4, after: 10 });
        assert_eq!(find("[X]<call>", MARKERS, false), Found::Marker { text: 0, start: 0, after: 3 });
    }

    #[test]
    fn what_may_become_a_marker_is_held_back_until_the_end() {
        assert_eq!(find("a <ca", MARKERS, false), Found::Certain(1));
        assert_eq!(find("a <ca", MARKERS, true), Found::Certain(5));
        assert_eq!(find("a <cab", MARKERS, false), Found::Certain(6));
        assert_eq!(find("a \n", MARKERS, false), Found::Certain(1));
        assert_eq!(find("é[", MARKERS, false), Found::Certain(2));
    }

    #[test]
    fn no_more_than_a_little_space_is_held_back() {
        let text = format!("a{}", " ".repeat(100));
        assert_eq!(find(&text, MARKERS, false), Found::Certain(101 - DROPPED_SPACE));
    }

    #[test]
    fn the_longer_of_two_markers_that_begin_alike_is_meant() {
        let markers = &["<a>", "<a><b>"];
        assert_eq!(find("<a>", markers, false), Found::Certain(0));
        assert_eq!(find("<a>", markers, true), Found::Marker { text: 0, start: 0, after: 3 });
        assert_eq!(find("<a><b>", markers, false), Found::Marker { text: 0, start: 0, after: 6 });
        assert_eq!(find("<a>x", markers, false), Found::Marker { text: 0, start: 0, after: 3 });
    }
}
