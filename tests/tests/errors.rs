//! What a report prints of an error: its text and those of its sources, each reason once.

use std::error::Error;
use std::io;

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text += &format!(": {source}");
        next = source.source();
    }
    text
}

#[test]
fn every_error_says_its_reason_once() {
    let reason = || io::Error::other("the disk is gone");
    let engine = || flowtape_engine::Error::Io { path: "a.json".into(), source: reason() };
    let model = || flowtape_flowmatch::Error::Model { model: "mine".into(), source: Box::new(reason()) };
    let data = || flowtape_data::Error::Sample { sample: "a.png".into(), source: Box::new(reason()) };
    let errors: [Box<dyn Error>; 8] = [
        Box::new(engine()),
        Box::new(flowtape_flowmatch::Error::from(engine())),
        Box::new(model()),
        Box::new(flowtape_trainer::Error::Io { path: "a.json".into(), source: reason() }),
        Box::new(flowtape_trainer::Error::from(flowtape_flowmatch::Error::from(engine()))),
        Box::new(flowtape_trainer::Error::from(model())),
        Box::new(data()),
        Box::new(flowtape_trainer::Error::from(data())),
    ];
    for error in errors {
        let said = chain(&*error);
        assert_eq!(said.matches("the disk is gone").count(), 1, "{said}");
    }
}
