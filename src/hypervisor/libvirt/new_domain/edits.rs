//! Changes to the text of an XML document, at the places that its parsed form tells. What is not
//! changed stays as it was, byte for byte.

use super::super::xml::escaped;
use roxmltree::Node;
use std::ops::Range;

pub(super) struct Edits<'t> {
    text: &'t str,
    changes: Vec<(Range<usize>, String)>,
}

impl<'t> Edits<'t> {
    pub(super) fn of(text: &'t str) -> Self {
        Edits {
            text,
            changes: Vec::new(),
        }
    }

    fn source(&self, range: Range<usize>) -> &'t str {
        self.text.get(range).unwrap_or_default()
    }

    pub(super) fn replace(&mut self, node: Node<'_, '_>, with: impl Into<String>) {
        self.changes.push((node.range(), with.into()));
    }

    pub(super) fn remove(&mut self, node: Node<'_, '_>) {
        self.replace(node, "");
    }

    /// Removes the children with this name.
    pub(super) fn remove_children(&mut self, node: Node<'_, '_>, name: &str) {
        for child in children(node, name) {
            self.remove(child);
        }
    }

    pub(super) fn remove_attribute(&mut self, node: Node<'_, '_>, name: &str) {
        if let Some(range) = attribute(node, name) {
            self.changes.push((range, String::new()));
        }
    }

    pub(super) fn set_attribute(&mut self, node: Node<'_, '_>, name: &str, value: &str) {
        let said = format!("{name}='{}'", escaped(value));
        match attribute(node, name) {
            Some(range) => self.changes.push((range, said)),
            None => {
                let at = node.range().start + 1 + self.tag(node).len();
                self.changes.push((at..at, format!(" {said}")));
            }
        }
    }

    /// As the last child.
    pub(super) fn insert_into(&mut self, node: Node<'_, '_>, child: &str) {
        let range = node.range();
        let source = self.source(range.clone());
        if source.ends_with("/>") {
            let end = format!(">{child}</{}>", self.tag(node));
            self.changes.push((range.end - 2..range.end, end));
        } else if let Some(end) = source.rfind("</") {
            let at = range.start + end;
            self.changes.push((at..at, child.to_string()));
        }
    }

    /// Attributes as they are written, each with a space before it.
    pub(super) fn attributes_of(&self, node: Node<'_, '_>, names: &[&str]) -> String {
        names
            .iter()
            .filter_map(|name| attribute(node, name))
            .map(|range| format!(" {}", self.source(range)))
            .collect()
    }

    /// The name in the start tag, prefix and all.
    fn tag(&self, node: Node<'_, '_>) -> &'t str {
        let source = self.source(node.range()).trim_start_matches('<');
        let end = source.find(|letter: char| letter.is_whitespace() || matches!(letter, '/' | '>'));
        source.get(..end.unwrap_or(0)).unwrap_or_default()
    }

    /// The text with all changes, unless two of them are about the same place.
    pub(super) fn apply(mut self) -> Option<String> {
        // Stable: what is inserted at one place stays in its order.
        self.changes
            .sort_by_key(|(range, _)| (range.start, range.end));
        let mut text = String::with_capacity(self.text.len());
        let mut at = 0;
        for (range, with) in &self.changes {
            text.push_str(self.text.get(at..range.start)?);
            text.push_str(with);
            at = range.end;
        }
        text.push_str(self.text.get(at..)?);
        Some(text)
    }
}

fn attribute(node: Node<'_, '_>, name: &str) -> Option<Range<usize>> {
    node.attributes()
        .find(|found| found.namespace().is_none() && found.name() == name)
        .map(|found| found.range())
}

/// libvirt reads only what is in no namespace.
pub(super) fn is(node: Node<'_, '_>, name: &str) -> bool {
    node.is_element() && node.tag_name().namespace().is_none() && node.tag_name().name() == name
}

pub(super) fn children<'a, 'i>(
    node: Node<'a, 'i>,
    name: &str,
) -> impl Iterator<Item = Node<'a, 'i>> {
    node.children().filter(move |child| is(*child, name))
}

pub(super) fn child<'a, 'i>(node: Node<'a, 'i>, name: &str) -> Option<Node<'a, 'i>> {
    children(node, name).next()
}

/// An attribute's value; empty if it is not there.
pub(super) fn value<'a>(node: Node<'a, '_>, name: &str) -> &'a str {
    node.attributes()
        .find(|found| found.namespace().is_none() && found.name() == name)
        .map_or("", |found| found.value())
}

#[cfg(test)]
mod tests {
    use super::*;
    use roxmltree::Document;

    fn edited(text: &str, edit: impl Fn(&mut Edits<'_>, Node<'_, '_>)) -> Option<String> {
        let document = Document::parse(text).unwrap();
        let mut edits = Edits::of(text);
        edit(&mut edits, document.root_element());
        edits.apply()
    }

    #[test]
    fn what_is_not_changed_stays_byte_for_byte() {
        let text = "\u{feff}<?xml version='1.0'?>\r\n<!-- ü --><a  b = \"1\"\tc='&lt;'>\r\n \
                    <![CDATA[</a>]]><d/>\u{1F600}<e></e ></a >\n";
        assert_eq!(edited(text, |_, _| {}).unwrap(), text);
        let changed = edited(text, |edits, root| {
            edits.set_attribute(root, "b", "'&\n");
            edits.remove_attribute(root, "c");
            edits.remove_children(root, "d");
            edits.insert_into(child(root, "e").unwrap(), "<f/>");
            edits.insert_into(root, "<g/>");
        })
        .unwrap();
        assert_eq!(
            changed,
            "\u{feff}<?xml version='1.0'?>\r\n<!-- ü --><a  b='&apos;&amp;&#10;'\t>\r\n \
             <![CDATA[</a>]]>\u{1F600}<e><f/></e ><g/></a >\n"
        );
    }

    #[test]
    fn an_element_without_content_gets_some() {
        for text in ["<x:a xmlns:x='n'/>", "<x:a xmlns:x='n' ></x:a>"] {
            let changed = edited(text, |edits, root| edits.insert_into(root, "<b/>")).unwrap();
            let document = Document::parse(&changed).unwrap();
            assert!(child(document.root_element(), "b").is_some(), "{changed}");
        }
        let changed = edited("<a/>", |edits, root| edits.set_attribute(root, "b", "c"));
        assert_eq!(changed.unwrap(), "<a b='c'/>");
    }

    #[test]
    fn wide_gaps_around_an_equals_sign_are_part_of_the_attribute() {
        let text = format!("<a b{}={}'1' c='2'/>", " ".repeat(400), "\n".repeat(400));
        let changed = edited(&text, |edits, root| edits.set_attribute(root, "b", "3"));
        assert_eq!(changed.unwrap(), "<a b='3' c='2'/>");
    }

    #[test]
    fn changes_of_one_place_are_refused() {
        let changed = edited("<a><b/></a>", |edits, root| {
            edits.remove(child(root, "b").unwrap());
            edits.remove(root);
        });
        assert_eq!(changed, None);
    }

    #[test]
    fn other_namespaces_are_not_meant() {
        let text = "<a xmlns:x='n'><x:b x:c='1'/><b c='2'/></a>";
        let document = Document::parse(text).unwrap();
        let found: Vec<_> = children(document.root_element(), "b").collect();
        assert_eq!(found.len(), 1);
        assert_eq!(value(found[0], "c"), "2");
        let foreign = "<a xmlns='n'><b/></a>";
        let document = Document::parse(foreign).unwrap();
        assert!(child(document.root_element(), "b").is_none());
    }
}
