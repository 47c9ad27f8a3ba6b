//! Which samples validation holds out.
#![allow(clippy::unwrap_used)] // the helpers of tests may panic

use std::sync::Arc;

use flowtape_data::{
    Chain, Fingerprint, Media, MemorySource, Result as DataResult, Sample, SampleHeader, Source, Text,
};
use flowtape_engine::{Device, Philox, Tensor};
use flowtape_trainer::Result;
use flowtape_trainer::builtin::WordTable;
use flowtape_trainer::data::Data;
use flowtape_trainer::validation::ValidationConfig;

/// Pictures with files' names, each repeated so often.
struct Named {
    pixels: MemorySource,
    first: usize,
}

impl Source for Named {
    fn len(&self) -> usize {
        self.pixels.len()
    }

    fn header(&self, index: usize) -> DataResult<SampleHeader> {
        self.pixels.header(index)
    }

    fn read(&self, index: usize, random: &mut Philox) -> DataResult<Sample> {
        self.pixels.read(index, random)
    }

    fn file(&self, index: usize) -> DataResult<Option<String>> {
        Ok(Some(format!("pictures/{}.png", self.first + index)))
    }

    fn fingerprint(&self) -> Fingerprint {
        self.pixels.fingerprint()
    }
}

fn numbered(first: usize, end: usize) -> Arc<dyn Source> {
    let sample = |i: usize| {
        let pixels = Tensor::full(&[1, 8, 8], i as f64, flowtape_engine::DType::F32, &Device::cpu()).unwrap();
        Sample::new(Media::Pixels(pixels), Text::Caption("a one".into()))
    };
    Arc::new(Named { pixels: MemorySource::new((first..end).map(sample).collect()).unwrap(), first })
}

/// The files of the samples on each side of a split.
fn sides(source: Arc<dyn Source>, validation: &ValidationConfig) -> Result<[Vec<String>; 2]> {
    let data = Data::of_pixels(source, WordTable::new(&["a one"], 8));
    let (trained, held) = data.split(Some(validation))?;
    let files = |source: &dyn Source| (0..source.len()).map(|i| source.file(i).unwrap().unwrap()).collect();
    Ok([files(&*trained.source), files(&*held)])
}

#[test]
fn a_split_by_content_stays_when_samples_are_added() {
    let tenth = ValidationConfig { fraction: Some(0.1), ..ValidationConfig::default() };
    let [trained, held] = sides(numbered(100, 500), &tenth).unwrap();
    // Five standard deviations of a binomial count.
    assert!(held.len().abs_diff(40) < 30 && trained.len() + held.len() == 400, "{}", held.len());
    // Others come before and after, and some are there twice as often.
    let source = Chain::new(vec![(numbered(0, 100), 1), (numbered(100, 500), 2), (numbered(500, 600), 1)]);
    let [more_trained, more_held] = sides(Arc::new(source), &tenth).unwrap();
    assert!(held.iter().all(|file| more_held.contains(file)));
    assert!(trained.iter().all(|file| more_trained.iter().filter(|other| *other == file).count() == 2));
    assert!(more_held.iter().all(|file| !more_trained.contains(file)));
    let nearly_none = ValidationConfig { fraction: Some(1e-9), ..ValidationConfig::default() };
    let error = sides(numbered(0, 10), &nearly_none).err().unwrap().to_string();
    assert!(error.contains("validation.fraction: holds out none of the 10 samples"), "{error}");
}

#[test]
fn a_list_says_which_samples_are_held_out() {
    let folder = tempfile::tempdir().unwrap();
    let list = folder.path().join("held.txt");
    let by_list = ValidationConfig { list: Some(list.clone()), ..ValidationConfig::default() };
    std::fs::write(&list, "3.png\r\n\npictures/7.png\n").unwrap();
    let [trained, held] = sides(numbered(0, 10), &by_list).unwrap();
    assert_eq!((trained.len(), held), (8, vec!["pictures/3.png".to_owned(), "pictures/7.png".to_owned()]));
    std::fs::write(&list, "3.png\nno.png\n").unwrap();
    let error = sides(numbered(0, 10), &by_list).err().unwrap().to_string();
    assert!(
        error.contains("held.txt") && error.contains("1 of its lines name no sample of the data: no.png"),
        "{error}"
    );
}
