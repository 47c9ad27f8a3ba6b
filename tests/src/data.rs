//! Buckets, samplers and caches against NeMo's.

use std::path::Path;
use std::sync::Arc;

use flowtape_data::bucket::dynamic_batch_size;
use flowtape_data::{
    BatchPlan, Bucket, BucketOptions, BucketSampler, Buckets, Collator, Crop, Cursor, Loaded, NemoCache, Pick,
    PixelCodec, Rank, Resolution, Sampler, Source, TextEmbeddings, TextEncoder,
};
use flowtape_engine::{DType, Device, Philox};
use serde_json::Value;

use crate::Outcome;
use crate::golden::{Any, Golden, exact, text};

fn numbers(value: &Value) -> Vec<usize> {
    value.as_array().into_iter().flatten().filter_map(|n| n.as_u64().map(|n| n as usize)).collect()
}

fn resolution(value: &Value) -> Any<Resolution> {
    match numbers(value)[..] {
        [width, height] => Ok(Resolution { width, height }),
        _ => Err(format!("{value} is no resolution").into()),
    }
}

fn size(value: &Value) -> usize {
    value.as_u64().unwrap_or_default() as usize
}

/// Tables of buckets, crops, batch sizes, and the batches of samplers.
pub(crate) fn bucketing(dir: &Path, name: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let golden = Golden::open(dir, name)?;
    for (i, case) in golden.list("calculators")?.iter().enumerate() {
        let args = &case["args"];
        let pixels = args["max_pixels"].as_u64().map_or(Buckets::MAX_PIXELS, |n| n as usize);
        let buckets = Buckets::new(size(&args["quantization"]), pixels)?;
        let wanted = case["buckets"].as_array().into_iter().flatten().map(|b| resolution(&b["resolution"]));
        out.push(exact(
            format!("buckets {i}"),
            buckets.resolutions == wanted.collect::<Any<Vec<_>>>()?,
            args.to_string(),
        ));
        let assigned = case["assignment"].as_array().into_iter().flatten();
        let holds = assigned.map(|a| Ok(buckets.of(resolution(&a["image"])?) == size(&a["bucket_id"])));
        let holds = holds.collect::<Any<Vec<bool>>>()?;
        out.push(exact(format!("assignment {i}"), holds.iter().all(|h| *h), format!("{} images", holds.len())));
    }
    let batches = golden.list("dynamic_batch_size")?.iter().map(|case| {
        let (base, to) = (resolution(&case["base_resolution"])?, resolution(&case["resolution"])?);
        Ok(dynamic_batch_size(size(&case["base_batch_size"]), base, to) == size(&case["batch_size"]))
    });
    let batches = batches.collect::<Any<Vec<bool>>>()?;
    out.push(exact("dynamic batch size", batches.iter().all(|h| *h), format!("{} cases", batches.len())));
    let crops = golden.list("resize_and_crop_center")?.iter().map(|case| {
        let crop = Crop::center(resolution(&case["image"])?, resolution(&case["target"])?);
        let wanted: Vec<Option<i64>> =
            case["crop_offset_xy"].as_array().into_iter().flatten().map(Value::as_i64).collect();
        Ok(crop.offset.map(Some)[..] == wanted[..])
    });
    let crops = crops.collect::<Any<Vec<bool>>>()?;
    out.push(exact("crops", crops.iter().all(|h| *h), format!("{} cases", crops.len())));
    let buckets = golden.list("sampler_buckets")?.iter().map(|bucket| {
        Ok(Bucket { resolution: resolution(&bucket["resolution"])?, indices: numbers(&bucket["indices"]) })
    });
    let buckets = buckets.collect::<Any<Vec<Bucket>>>()?;
    for (i, case) in golden.list("samplers")?.iter().enumerate() {
        out.push(sampler(format!("sampler {i}"), &buckets, case)?);
    }
    let resume = &golden.json["resume"];
    let options = BucketOptions::of_size(2);
    let fresh = BucketSampler::new(buckets, options);
    let state = &resume["state"];
    let at = Cursor { epoch: size(&state["epoch"]) as u64, batch: size(&state["batches_yielded"]) as u64 };
    let rest = epoch(&fresh, at, Rank::ALONE);
    let second = epoch(&fresh, Cursor { epoch: 1, batch: 0 }, Rank::ALONE);
    let holds = rest == lists(&resume["rest"]) && second == lists(&resume["second_epoch_after_resume"]);
    out.push(exact("resume", holds, "the rest of an epoch, and the next"));
    Ok(())
}

fn lists(value: &Value) -> Vec<Vec<usize>> {
    value.as_array().into_iter().flatten().map(numbers).collect()
}

/// The batches from a cursor to the end of its epoch.
fn epoch(sampler: &BucketSampler, mut at: Cursor, rank: Rank) -> Vec<Vec<usize>> {
    let mut batches = Vec::new();
    let first = at.epoch;
    while let Some(plan) = sampler.plan(at, rank).filter(|plan| plan.next.epoch == first) {
        batches.push(plan.picks.iter().map(|pick| pick.index).collect());
        at = plan.next;
    }
    batches
}

fn sampler(name: String, buckets: &[Bucket], case: &Value) -> Any<Outcome> {
    let flag = |key: &str| case[key].as_bool().unwrap_or_default();
    let base = resolution(&case["base_resolution"])?;
    let options = BucketOptions {
        batch_size: size(&case["base_batch_size"]),
        base_resolution: flag("dynamic_batch_size").then_some(base),
        seed: flag("shuffle").then_some(size(&case["seed"]) as u64),
        drop_last: flag("drop_last"),
    };
    let sampler = BucketSampler::new(buckets.to_vec(), options);
    let count = size(&case["num_replicas"]) as u64;
    let at = Cursor { epoch: size(&case["epoch"]) as u64, batch: 0 };
    let got: Vec<Vec<Vec<usize>>> = (0..count).map(|index| epoch(&sampler, at, Rank { index, count })).collect();
    let wanted: Vec<Vec<Vec<usize>>> = case["batches_per_rank"].as_array().into_iter().flatten().map(lists).collect();
    if options.seed.is_none() {
        return Ok(exact(name, got == wanted, "batch by batch"));
    }
    // Another generator: as many batches of the same sizes on every rank, each of one bucket, and the same samples as often
    // where none is left out.
    let bucket = |index: &usize| buckets.iter().position(|bucket| bucket.indices.contains(index));
    let shape = |ranks: &[Vec<Vec<usize>>]| -> Vec<Vec<(usize, Option<usize>)>> {
        let sizes = |batches: &Vec<Vec<usize>>| {
            let mut sizes: Vec<_> = batches.iter().map(|batch| (batch.len(), bucket(&batch[0]))).collect();
            sizes.sort_unstable();
            sizes
        };
        ranks.iter().map(sizes).collect()
    };
    let pure = got.iter().flatten().all(|batch| batch.iter().all(|index| bucket(index) == bucket(&batch[0])));
    let often = |ranks: &[Vec<Vec<usize>>]| {
        let mut all: Vec<usize> = ranks.iter().flatten().flatten().copied().collect();
        all.sort_unstable();
        all.dedup();
        all
    };
    let same = options.drop_last || often(&got) == often(&wanted);
    Ok(exact(name, shape(&got) == shape(&wanted) && pure && same, "sizes, buckets and samples"))
}

/// Refuses: samples of a cache are encoded.
struct NoText;

impl TextEncoder for NoText {
    fn encode(&self, _: &[Option<&str>], _: &Device) -> flowtape_data::Result<TextEmbeddings> {
        Err(flowtape_data::Error::batch("text", "embeddings", "captions"))
    }
}

/// The samples of a cache folder of NeMo's, in its buckets, and as batches.
pub(crate) fn cache(dir: &Path, name: &str, out: &mut Vec<Outcome>) -> Any<()> {
    let golden = Golden::open(dir, name)?;
    let source = NemoCache::open(&dir.join(name.trim_end_matches("_batches")))?;
    let sampler = BucketSampler::new(BucketSampler::buckets_of(&source)?, BucketOptions::of_size(1));
    let groups: Vec<Value> = golden.list("bucket_order")?.to_vec();
    let wanted: Vec<Vec<usize>> =
        groups.iter().filter_map(Value::as_str).map(|g| numbers(&golden.json["bucket_groups"][g])).collect();
    let got: Vec<Vec<usize>> = sampler.buckets().iter().map(|bucket| bucket.indices.clone()).collect();
    out.push(exact("buckets", got == wanted, format!("{got:?}")));
    let collator = Collator { codec: Arc::new(PixelCodec), text: Arc::new(NoText), caption_dropout_prob: 0.0, seed: 0 };
    for (i, case) in golden.list("batches")?.iter().enumerate() {
        let picks: Vec<Pick> =
            numbers(&case["indices"]).into_iter().map(|index| Pick { index, place: index as u64 }).collect();
        let samples = picks.iter().map(|pick| source.read(pick.index, &mut Philox::new(0)));
        let samples = samples.collect::<flowtape_data::Result<Vec<_>>>()?;
        let loaded = Loaded { plan: BatchPlan { picks, next: Cursor::default() }, samples };
        let batch = collator.batch(&loaded, &Device::cpu())?;
        for (key, about) in case["keys"].as_object().into_iter().flatten() {
            let title = format!("batch {i}/{key}");
            if key == "data_type" {
                out.push(exact(title, about == batch.data_type.as_str(), about.to_string()));
                continue;
            }
            let tensor = if key.ends_with("_latents") { &batch.latents } else { batch.require(key)? };
            let want = golden.tensor(&format!("batch{i}.{key}"))?;
            let same = tensor.dims() == want.dims() && tensor.to_vec::<f32>()? == want.to_vec::<f32>()?;
            let kind = text(about, "dtype")?;
            let dtype = match tensor.dtype() {
                DType::BF16 => "bfloat16",
                DType::F16 => "float16",
                DType::F32 => "float32",
                DType::F64 => "float64",
                // Ours for integers.
                DType::U32 => "int64",
            };
            out.push(exact(title, same && dtype == kind, format!("{kind} {:?}", want.dims())));
        }
    }
    Ok(())
}
