//! HTML as values: a text is escaped when it becomes part of it, so no name can become markup.

use tidemill_rlhf::chart::{Fragment, escape};

/// HTML that is whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Html(String);

/// An element that is being written.
#[derive(Clone, Debug)]
pub struct Element {
    name: &'static str,
    start: String,
    inside: String,
}

/// Elements without an inside.
const VOID: [&str; 2] = ["input", "br"];

/// An element of this name.
pub fn tag(name: &'static str) -> Element {
    Element { name, start: format!("<{name}"), inside: String::new() }
}

/// Pieces one after the other.
pub fn all(pieces: impl IntoIterator<Item = impl Into<Html>>) -> Html {
    Html(pieces.into_iter().map(|piece| piece.into().0).collect())
}

impl Element {
    /// With an attribute.
    pub fn attr(mut self, name: &'static str, value: impl AsRef<str>) -> Self {
        self.start.extend([" ", name, "=\"", &escape(value.as_ref()), "\""]);
        self
    }

    /// With an attribute that has no value, where it holds.
    pub fn flag(mut self, name: &'static str, on: bool) -> Self {
        if on {
            self.start.extend([" ", name]);
        }
        self
    }

    /// With classes.
    pub fn class(self, classes: &str) -> Self {
        self.attr("class", classes)
    }

    /// With this at the end of its inside.
    pub fn with(mut self, inside: impl Into<Html>) -> Self {
        self.inside.push_str(&inside.into().0);
        self
    }

    /// With all of these.
    pub fn with_all(self, pieces: impl IntoIterator<Item = impl Into<Html>>) -> Self {
        self.with(all(pieces))
    }
}

impl Html {
    /// The markup.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<Element> for Html {
    fn from(Element { name, start, inside }: Element) -> Self {
        if VOID.contains(&name) { Self(format!("{start}>")) } else { Self(format!("{start}>{inside}</{name}>")) }
    }
}

impl From<&str> for Html {
    fn from(text: &str) -> Self {
        Self(escape(text))
    }
}

impl From<String> for Html {
    fn from(text: String) -> Self {
        Self::from(text.as_str())
    }
}

impl From<&String> for Html {
    fn from(text: &String) -> Self {
        Self::from(text.as_str())
    }
}

impl From<&Fragment> for Html {
    fn from(fragment: &Fragment) -> Self {
        Self(fragment.as_str().to_owned())
    }
}

impl<T: Into<Self>> From<Option<T>> for Html {
    fn from(piece: Option<T>) -> Self {
        piece.map_or_else(Self::default, Into::into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_attributes_are_escaped_and_elements_closed() {
        let evil = "\"><img src=x onerror='x'>&";
        let escaped = "&quot;&gt;&lt;img src=x onerror=&#39;x&#39;&gt;&amp;";
        let link = tag("a").attr("href", evil).class("c").flag("hidden", true).flag("open", false).with(evil).with(tag("br"));
        assert_eq!(Html::from(link).as_str(), format!("<a href=\"{escaped}\" class=\"c\" hidden>{escaped}<br></a>"));
        let list = tag("ul").with_all(["a", "b"].map(|item| tag("li").with(item))).with(None::<&str>);
        assert_eq!(Html::from(list).as_str(), "<ul><li>a</li><li>b</li></ul>");
    }
}
